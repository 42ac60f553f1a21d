# SPDX-License-Identifier: Apache-2.0
"""A folder, quantized or not -> logits and text."""

from ..checkpoint.chat import render_chat
from .model import Model
from .session import Session
from .text_stream import stream_text

__all__ = ["Model", "Session", "render_chat", "stream_text"]
