# SPDX-License-Identifier: Apache-2.0
"""A ModelSpec as JSON, as quantization_config.model of a packed folder has it, and back.

The fields of the dataclasses in spec.py are the format: a field is a key. A field made by
`optional` is written only where it differs from its default. What JSON says twice (sizes of the
linears, the sites) is checked against what follows from the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .config_json import Fields
from .spec import (
    INNER_NORMS,
    MOST_EXPERTS,
    NORM_PLACES,
    ROLES,
    AttentionSpec,
    DenseSpec,
    ExpertsSpec,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PositionsSpec,
    RotarySpec,
    layer_sizes,
    role_row,
)

STORED_FIELDS = ("stored", "stored_bias", "first_row", "blocks", "transposed", "experts", "rows",
                 "expert")  # of a LinearSpec: a packed folder stores each linear by itself


# ---- writing ------------------------------------------------------------------------------------


def model_json(spec: ModelSpec) -> dict[str, Any]:
    """JSON values of all fields and of the sites; `model_spec` takes them back.

    The linears of experts stand once, with `{e}` for the expert's number.
    """
    return _values(spec)


def _values(spec: Any) -> dict[str, Any]:
    values = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        default = {} if field.default is dataclasses.MISSING else field.default
        if field.metadata.get("optional") and value == default:
            continue
        values[field.name] = _value(value)
    if isinstance(spec, LinearSpec):
        return {key: value for key, value in values.items() if key not in STORED_FIELDS}
    if isinstance(spec, LayerSpec):
        values["linears"] = _templates(spec.linears)
        values["sites"] = _sites(spec)
    return values


def _value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _values(value)
    if isinstance(value, Mapping):
        return {key: _value(entry) for key, entry in value.items()}
    return [_value(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _templates(linears: Mapping[str, LinearSpec]) -> dict[str, Any]:
    """By role; the first expert's stand for all."""
    return {role.replace(".0", ".{e}"): _values(linear) for role, linear in linears.items()
            if not linear.expert}


def _sites(layer: LayerSpec) -> dict[str, list[str]]:
    """Roles by site; the first expert's stand for all."""
    return {name.replace(".0", ".{e}"): [role.replace(".0", ".{e}") for role in site.roles]
            for name, site in layer.sites.items() if not site.expert}


# ---- reading ------------------------------------------------------------------------------------


def model_spec(f: Fields) -> ModelSpec:
    """The spec of a packed folder. FormatError names the key, the expected and the found."""
    hidden = f.integer("hidden")
    readers = {"final_norm": _optional_norm, "embed_norm": _optional_norm,
               "positions": lambda f, key: _read(PositionsSpec, f.object(key)),
               "kinds": lambda f, key: tuple(_layer(kind, hidden) for kind in f.objects(key))}
    spec = _read(ModelSpec, f, readers)
    if not spec.pattern or max(spec.pattern) >= len(spec.kinds):
        raise f.error("pattern", f"indices of {len(spec.kinds)} kinds")
    names = (entry.name for kind in spec.kinds
             for entry in (*kind.norms.values(), *kind.dense.values(), *kind.linears.values()))
    if spec.layers > len(spec.pattern) and not all("{i}" in name for name in names):
        raise f.error("layers", f"at most {len(spec.pattern)}, as a name of the layers has no "
                                "{i} that tells one from the next")
    return spec


def _read(cls: type, f: Fields, readers: Mapping[str, Callable[[Fields, str], Any]] = {}) -> Any:
    """A dataclass from its keys; readers: of fields that are no plain values."""
    values = {}
    for field in dataclasses.fields(cls):
        key = field.name
        if field.metadata.get("optional") and f.absent(key):
            continue
        read = readers.get(key)
        values[key] = read(f, key) if read else _plain(f, key, field.type, field.metadata)
    f.require_no_others()
    return cls(**values)


def _plain(f: Fields, key: str, kind: str, checks: Mapping[str, Any]) -> Any:
    """A value whose type is written in the dataclass."""
    least = checks.get("least", 1)
    if kind == "str" and "choices" in checks:
        return f.choice(key, checks["choices"])
    if kind == "float" and checks.get("positive"):
        return f.number(key)
    readers: dict[str, Callable[[], Any]] = {
        "bool": lambda: f.boolean(key),
        "float": lambda: f.finite(key),
        "int": lambda: f.integer(key, least),
        "str": lambda: f.string(key),
        "str | None": lambda: f.string(key),
        "tuple[float, ...]": lambda: tuple(f.finites(key)),
        "tuple[int, ...]": lambda: tuple(f.integers(key, least)),
    }
    return readers[kind]()


def _norm(f: Fields) -> NormSpec:
    return _read(NormSpec, f)


def _optional_norm(f: Fields, key: str) -> NormSpec | None:
    return None if f.absent(key) else _norm(f.object(key))


def _layer(f: Fields, hidden: int) -> LayerSpec:
    attention = _attention(f.object("attention"))
    mlp = None if f.absent("mlp") else _read(MlpSpec, f.object("mlp"))
    experts = None if f.absent("experts") else _experts(f.object("experts"))
    if (mlp is None) == (experts is None):
        raise f.error("mlp", "an object, or null and an object under experts")
    sizes = layer_sizes(hidden, attention, mlp, experts)
    norms, dense = f.object("norms"), f.object("dense") if "dense" in f else Fields({}, "")
    layer = LayerSpec(
        hidden=f.integer("hidden"), attention=attention, mlp=mlp, experts=experts,
        norms={place: _norm(norms.object(place)) for place in (*NORM_PLACES, *INNER_NORMS)
               if place in norms},
        linears=_linears(f.object("linears"), sizes, experts),
        parallel=f.boolean("parallel"), residual_scale=f.finite("residual_scale"),
        norm_sums="norm_sums" in f and f.boolean("norm_sums"),
        dense={name: _read(DenseSpec, dense.object(name)) for name in dense.entries()},
    )
    if layer.hidden != hidden:
        raise f.error("hidden", f"the model's {hidden}")
    expected = _sites(layer)
    if f["sites"] != expected:
        raise f.error("sites", f"{expected}, as the blocks ask for")
    for fields in (norms, f):
        fields.require_no_others()
    return layer


def _linears(
    f: Fields, sizes: Mapping[str, int], experts: ExpertsSpec | None
) -> dict[str, LinearSpec]:
    """By role, in the order of ROLES, the experts' one expert after the other."""
    templates = {role: _linear(f.object(role), role, sizes)
                 for row in ROLES for role in (row, f"{row}.{{e}}") if role in f}
    f.require_no_others()
    linears = {role: linear for role, linear in templates.items() if "{e}" not in role}
    for e in range(experts.count if experts else 0):
        linears |= {role.replace("{e}", str(e)): dataclasses.replace(linear, expert=e)
                    for role, linear in templates.items() if "{e}" in role}
    missing = [role for role in ("o", "down" if experts is None else "down.0")
               if role not in linears]
    if missing:
        raise f.error(missing[0], "an object")
    return linears


def _linear(f: Fields, role: str, sizes: Mapping[str, int]) -> LinearSpec:
    row = role_row(role)
    linear = LinearSpec(f.string("name"), f.integer("n"), f.integer("k"), f.boolean("bias"))
    for key, expected in (("n", sizes[row.outputs]), ("k", sizes[row.inputs])):
        if getattr(linear, key) != expected:
            raise f.error(key, f"{expected}, as the blocks ask for")
    f.require_no_others()
    return linear


def _attention(f: Fields) -> AttentionSpec:
    head_dim, heads = f.integer("head_dim"), f.integer("heads")
    if heads % f.integer("kv_heads"):
        raise f.error("kv_heads", f"a divisor of heads = {heads}")
    return _read(AttentionSpec, f, {"rotary": lambda f, key: _rotary(f, key, head_dim)})


def _rotary(f: Fields, key: str, head_dim: int) -> RotarySpec | None:
    if f.absent(key):
        return None
    g = f.object(key)
    rotary = _read(RotarySpec, g)
    if not 1 <= len(rotary.inv_freq) <= head_dim // 2:
        raise g.error("inv_freq", f"1 to {head_dim // 2} frequencies", len(rotary.inv_freq))
    if rotary.long_inv_freq and len(rotary.long_inv_freq) != len(rotary.inv_freq):
        raise g.error("long_inv_freq", f"{len(rotary.inv_freq)} frequencies",
                      len(rotary.long_inv_freq))
    return rotary


def _experts(f: Fields) -> ExpertsSpec:
    experts = _read(ExpertsSpec, f)
    if experts.count > MOST_EXPERTS or experts.chosen > experts.count:
        raise f.error("count", f"chosen = {experts.chosen} to {MOST_EXPERTS} experts")
    return experts
