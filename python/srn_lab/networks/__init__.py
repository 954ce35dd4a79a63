"""The networks: SN-GAN's pair, classifiers, and the critic of the neural divergence."""

from srn_lab.networks.classifiers import CLASSIFIERS, classifier
from srn_lab.networks.critic import Critic
from srn_lab.networks.gan import RESOLUTIONS, Discriminator, Generator

__all__ = ["CLASSIFIERS", "RESOLUTIONS", "Critic", "Discriminator", "Generator", "classifier"]
