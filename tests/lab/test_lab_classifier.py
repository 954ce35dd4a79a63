"""The classifier's trainer: exact resume, its schedule, and random labels."""

import dataclasses

import pytest
import torch
from srn_lab.data import DataSpec, load
from srn_lab.methods import Method
from srn_lab.training.classifier import ClassifierTrainer, train_classifier
from srn_lab.training.config import ClassifierConfig
from srn_lab.training.engine import accelerator

DIGITS = DataSpec("digits", 8)
SMALL = ClassifierConfig(
    data=DIGITS,
    method=Method("none"),
    network="small-densenet",
    images=40,
    epochs=4,
    batch_size=10,
    learning_rate=0.05,
    halve_every=2,
)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("method", [Method("none"), Method("srn", 0.3)], ids=lambda m: m.label)
def test_an_interrupted_classifier_ends_with_the_same_bits(method, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, method=method)
    whole = train_classifier(config)

    def hear(epoch):
        if epoch == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_classifier(config, tmp_path, on_epoch=hear, save_every_s=0.0)
    again = train_classifier(config, tmp_path)
    assert again.curves == whole.curves
    states = [trainer.network.state_dict() for trainer in (whole, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_learning_rate_of_sgd_halves_and_curves_are_evaluations():
    trainer = train_classifier(SMALL)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 / 2)
    assert [row["epoch"] for row in trainer.curves] == [0, 1, 2, 3, 4]
    images, labels = trainer.test.images, trainer.test.labels
    trainer.network.eval()
    with torch.no_grad():
        logits = trainer.network(images)
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    assert trainer.curves[-1]["test_accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert trainer.curves[-1]["test_loss"] == pytest.approx(loss, rel=1e-5)


def test_random_labels_are_the_same_labels_on_other_images():
    engine = accelerator(None, "no", track=False, cpu=True)
    train, test = load(DIGITS), load(DIGITS, "test")
    true = ClassifierTrainer(SMALL, train, test, engine).train
    config = dataclasses.replace(SMALL, random_labels=True)
    shuffled = ClassifierTrainer(config, train, test, engine).train
    assert torch.equal(true.pixels, shuffled.pixels)
    assert (
        true.labels.bincount(minlength=10).tolist()
        == shuffled.labels.bincount(minlength=10).tolist()
    )
    assert (true.labels != shuffled.labels).float().mean() > 0.5
    with pytest.raises(ValueError, match="images must be at most"):
        ClassifierTrainer(dataclasses.replace(SMALL, images=10**6), train, test, engine)
    with pytest.raises(ValueError, match="method wgan-gp is for GANs"):
        ClassifierTrainer(dataclasses.replace(SMALL, method=Method("wgan-gp")), train, test, engine)
