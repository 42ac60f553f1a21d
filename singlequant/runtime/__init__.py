# SPDX-License-Identifier: Apache-2.0
"""A folder, quantized or not -> logits and text."""

from ..checkpoint.chat import render_chat
from .generate import stream_text
from .model import Model
from .session import Session

__all__ = ["Model", "Session", "render_chat", "stream_text"]
