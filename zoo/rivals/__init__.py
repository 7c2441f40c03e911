"""Rivals."""
from zoo.rivals.r2 import R2, Spatial, Temporal
from zoo.rivals.rules import Klass, Notes, factor, looks_back
from zoo.rivals.wino import Wino

NOTES: dict[str, type[Notes]] = {
    "klass": Klass, "r2": R2, "r2-spatial": Spatial, "r2-temporal": Temporal, "wino": Wino,
}  # fmt: skip
RULES = {"factor": factor} | {name: looks_back for name in NOTES}
