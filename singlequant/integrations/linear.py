# SPDX-License-Identifier: Apache-2.0
"""torch.nn.Linear on the packed kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _C
from ..weights import PackedLinear
from .rotation_state import NAMES as ROTATION_NAMES, rotation_arrays
from .shared_input import Turn, prepare, turn_of

REQUIRED = ("weight_packed", "weight_scale", "weight_layout", "activation_layout",
            "activation_clip")
OPTIONAL = ("bias", *ROTATION_NAMES)


class Linear(torch.nn.Module):
    """y = x W^T + b in inference on the CPU, with W of 4, 5, 6 or 8 bits and a rotation of x.

    in_features, out_features, bias: as of torch.nn.Linear. A new module has no weight yet:
    `Linear.of` makes one that has, and load_state_dict fills one. x is float32, which is read in
    place, or of another float type, which is converted; y has the type of x. Weight and scales keep
    their types under `half`, `bfloat16` and `to`. There is no backward.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._has_bias = bias
        self._arrays: dict[str, NDArray[Any]] = {}  # all there is to it, as state_dict has it
        self._panels: _C.PackedWeight | None = None  # made of the arrays, as is the rest
        self._turn: Turn | None = None
        self._bits, self._clip = 16, 1.0

    @classmethod
    def of(
        cls, weight: PackedLinear, bias: NDArray[Any] | None = None,
        rotation: _C.Rotation | None = None, activation_bits: int = 8, clip: float = 1.0,
        int8_inputs: int = 0,
    ) -> Linear:
        """A linear with that weight, which belongs to the rotated inputs.

        activation_bits, clip, int8_inputs: of the quantizer of the inputs, as in docs/format.md.
        ValueError where they do not go together.
        """
        n, k = weight.shape
        module = cls(k, n, bias is not None)
        arrays: dict[str, NDArray[Any]] = {
            "weight_packed": weight.words, "weight_scale": weight.scales,
            "weight_layout": np.array([n, k, weight.bits, weight.group], np.int64),
            "activation_layout": np.array([activation_bits, int8_inputs], np.int64),
            "activation_clip": np.array([clip], np.float32), **rotation_arrays(rotation),
        }
        if bias is not None:
            arrays["bias"] = np.ascontiguousarray(_C.to_float32(bias))
        module._fill(arrays)
        return module.eval()

    def _fill(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take the arrays, and make of them what forward reads. ValueError leaves all as it was."""
        n, k = self.out_features, self.in_features
        layout, activations = (arrays[name].tolist() for name in REQUIRED[2:4])
        if len(layout) != 4 or layout[:2] != [n, k]:
            raise ValueError(f"weight_layout: expected ({n}, {k}, bits, group), found {layout}")
        if len(activations) != 2 or activations[0] not in (4, 8, 16):
            raise ValueError(f"activation_layout: expected (4, 8 or 16, 8-bit inputs), found "
                             f"{activations}")
        if activations[1] and activations[0] != 4:
            raise ValueError(f"activation_layout: expected 4 bits, as {activations[1]} inputs have "
                             f"8, found {activations[0]}")
        clip = arrays["activation_clip"].reshape(-1).tolist()
        if len(clip) != 1 or not 0.0 < clip[0] <= 1.0:
            raise ValueError(f"activation_clip: expected a number in (0, 1], found {clip}")
        bias = arrays.get("bias")
        if (bias is not None) != self._has_bias or (bias is not None and bias.shape != (n,)):
            raise ValueError(f"bias: expected {f'({n},)' if self._has_bias else 'none'}, found "
                             f"{'none' if bias is None else bias.shape}")
        packed = PackedLinear(arrays["weight_packed"], arrays["weight_scale"], (n, k), layout[3],
                              layout[2])
        panels = _C.PackedWeight(packed.words, packed.scales, k, packed.group, activations[1],
                                 packed.bits)
        self._turn = turn_of(k, arrays, self)
        self._arrays, self._panels, self._bits = arrays, panels, activations[0]
        self._clip = clip[0]

    @property
    def packed(self) -> PackedLinear:
        """The packed weight, of rotated inputs. RuntimeError where none was loaded."""
        self._require_weight()
        n, k, bits, group = self._arrays["weight_layout"].tolist()
        return PackedLinear(self._arrays["weight_packed"], self._arrays["weight_scale"], (n, k),
                            group, bits)

    @property
    def nbytes(self) -> int:
        """Bytes of the state: codes, scales, bias and the rotation that others may share."""
        return sum(array.nbytes for array in self._arrays.values())

    def weight(self) -> torch.Tensor:
        """What the codes stand for, [out_features, in_features] float32, of unrotated inputs.

        It is computed at each call. As in torch.ao's quantized modules it is a method: code that
        would multiply by a `weight` fails.
        """
        packed = self.packed
        codes = _C.unpack(packed.words, self.in_features, packed.bits)
        weight = _C.dequantize(codes, packed.scales)
        if self._turn is not None:  # y = x T W'^T
            turn = _C.rotate(np.eye(self.in_features, dtype=np.float32), self._turn.core)
            weight = _C.linear_dense(weight, turn)
        return torch.from_numpy(weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """y [..., out_features] of x [..., in_features], of the same type. The name is torch's."""
        x = input
        self._require_weight()
        if self.training:
            raise RuntimeError("singlequant Linear: expected inference, found training mode: call "
                               "eval() on the model")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("singlequant Linear: there is no backward: run the model under "
                               "torch.inference_mode() or torch.no_grad()")
        if x.device.type != "cpu" or not x.is_floating_point():
            raise TypeError(f"singlequant Linear: expected floats on the CPU, found {x.dtype} on "
                            f"{x.device}")
        values, bias = x.detach().float().numpy(), self._arrays.get("bias")
        if self._turn is not None and len(self._turn.users) > 1:
            shared = prepare(x, values, self._turn, self._bits, self._clip,
                             self._panels.int8_inputs)
            y = shared.linear(self._panels, bias)
        else:
            y = _C.linear(values, self._panels, self._bits, self._clip,
                          None if self._turn is None else self._turn.core, bias)
        return torch.from_numpy(y).to(x.dtype)

    def _require_weight(self) -> None:
        if self._panels is None:
            raise RuntimeError("singlequant Linear: expected a weight, found none: load a "
                               "state_dict, or make the module by Linear.of")

    def extra_repr(self) -> str:
        """What repr shows between the brackets."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self._has_bias}"
        if self._panels is None:
            return f"{text}, no weight"
        n, k, bits, group = self._arrays["weight_layout"].tolist()
        rotated = "" if self._turn is None else ", rotated"
        return f"{text}, weight_bits={bits}, group={group}, activation_bits={self._bits}{rotated}"

    # ---- state: arrays, which no `half` or `to` converts ----------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            raise ValueError(f"singlequant Linear: expected the CPU, found {device}")
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, array in self._arrays.items():
            destination[prefix + name] = _tensor(array)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        own = {key[len(prefix):]: value for key, value in state_dict.items()
               if key.startswith(prefix)}
        missing = [name for name in REQUIRED if name not in own]
        missing_keys += [prefix + name for name in missing]
        if strict:
            unexpected_keys += [prefix + name for name in own if name not in REQUIRED + OPTIONAL]
        if missing:
            return
        arrays = {name: value.detach().cpu().contiguous().numpy().copy()
                  for name, value in own.items() if name in REQUIRED + OPTIONAL}
        try:
            self._fill(arrays)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'Linear'}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_panels": None, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._arrays:
            self._fill(self._arrays)


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    """The array as a tensor, in place unless it is read-only."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
