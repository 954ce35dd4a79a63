"""GAN experiments of the Stable Rank Normalization paper, small enough for a laptop.

Run ``python -m srn_lab --help``. The package trains SN-GANs and SRN-GANs on scikit-learn's
handwritten digits, draws the empirical Lipschitz histogram (eLhist) of their discriminators and
times what one ``srn_kernels.convert_spectral_norm`` call changes in an existing model.

Paper: Sanyal, Torr, Dokania, "Stable Rank Normalization for Improved Generalization in Neural
Networks and GANs", arXiv 1906.04659, Section 4.2 and Appendix E.
"""
