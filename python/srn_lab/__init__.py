"""The experiments of the Stable Rank Normalization paper, small enough for a laptop.

Run ``python -m srn_lab --help``. ``paper`` remakes every experiment and judges every claim;
``train``, ``elhist`` and ``overhead`` are its parts by hand; :mod:`srn_lab.measures` measures a
network of your own.

Paper: Sanyal, Torr, Dokania, "Stable Rank Normalization for Improved Generalization in Neural
Networks and GANs", arXiv 1906.04659. Imports run one way through the folders: data, methods,
networks, measures, training, experiments, report, cli.
"""
