"""Which keys of a yacs config are read."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode


class ReadKeys(CfgNode):
    """A copy of a config that notes which of its keys are read.

    Args:
        cfg: the config.
        read: set to which full keys of values are added as they are read.
        prefix: what the full keys start with.
    """

    def __init__(self, cfg: CfgNode, read: set[str], prefix: str = "") -> None:
        super().__init__()
        self.__dict__.update(plain=cfg, read=read, prefix=prefix)
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                value = ReadKeys(value, read, f"{prefix}{key}.")
            dict.__setitem__(self, key, value)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, CfgNode):
            self.read.add(self.prefix + key)
        return value

    def __iter__(self) -> Iterator[str]:  # also lets dict(...) and ** ask for the items one by one
        return iter(list(super().keys()))

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def items(self) -> list[tuple[str, Any]]:
        return [(key, self[key]) for key in self]

    def values(self) -> list[Any]:
        return [self[key] for key in self]

    def __deepcopy__(self, memo: dict[int, Any]) -> CfgNode:
        self.read.update(self.prefix + key for key in flat(self.plain))
        return copy.deepcopy(self.plain, memo)


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All values of a config by full key, sequences as lists."""
    rows: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            rows.update(flat(value, f"{prefix}{key}."))
        else:
            rows[prefix + key] = list(value) if isinstance(value, tuple) else value
    return rows
