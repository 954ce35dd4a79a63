"""The rules by name: those of the package, and what people register."""

from __future__ import annotations

from srn_kernels.maths.rule import Rule
from srn_kernels.maths.top_one import TOP_ONE

_rules: dict[str, Rule] = {TOP_ONE.name: TOP_ONE}
_made: dict[str, Rule] = {}  # by the names of choose


def register_rule(rule: Rule) -> Rule:
    """Makes a normalisation from outside the package an option: ``rule=`` its name.

    rule: an instance of a subclass of :class:`srn_kernels.Rule`. Returns it, so that it can be
    used at once. TypeError: not a rule, or without a name; ValueError: the name is taken.

    Example:
        >>> class Halved(srn.Rule):
        ...     name = "halved"
        ...     def normalize(self, w, u, v, target_rank, iterations, eps):
        ...         return w / 2, u, v, self.stats_of(w)
        ...     def gradient(self, g, w, u, v, stats, target_rank):
        ...         return g / 2
        >>> _ = srn.register_rule(Halved())
        >>> layer = srn.stable_rank_norm(nn.Linear(4, 4), rule="halved")
        >>> torch.equal(srn.normalized_weight(layer), layer.weight / 2)
        True
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be an instance of srn_kernels.Rule, got {rule!r}")
    name = getattr(rule, "name", None)
    if not isinstance(name, str) or not name or ":" in name:
        raise TypeError(f"rule.name must be a name without a colon, got {name!r}")
    if rule.kernels or rule.split:
        raise ValueError(f"rule {name!r}: kernels and split are for rules that the package knows")
    if _rules.setdefault(name, rule) is not rule:
        raise ValueError(f"rule: there is one of the name {name!r} already")
    return rule


def check_rule(name: str) -> str:
    """ValueError, naming what there is, for a rule that nobody registered."""
    if not isinstance(name, str) or name not in _rules:
        raise ValueError(f"rule must be one of {sorted(_rules)}, got {name!r}")
    return name


def choose(name: str, preserve: int) -> str:
    """The one name of a rule and the number of singular values it keeps, for :func:`named`."""
    return name if preserve == 1 else f"{name}:{preserve}"


def named(key: str) -> Rule:
    """The rule of a name, or of one of :func:`choose`."""
    if key not in _made:
        name, _, preserve = key.partition(":")
        rule = _rules[check_rule(name)]
        _made[key] = rule.preserving(int(preserve)) if preserve else rule
    return _made[key]
