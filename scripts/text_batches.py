"""What deepseek_v4.py and train_text.py share: text as batches of bytes, and which device."""

import argparse
from pathlib import Path

import torch
from torch import Tensor


def add_arguments(parser: argparse.ArgumentParser, text: Path | None, named: str) -> None:
    """--device, --text and --json; the text is by default `text`, which help calls `named`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"default: {device}")
    parser.add_argument("--text", type=Path, default=text, help=f"a file; default: {named}")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with a usage error unless the device is usable and the text has something to read."""
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text must name a file; got {arguments.text}")
    if arguments.text is not None and not arguments.text.stat().st_size:
        parser.error(f"--text must name a text that is not empty; got {arguments.text}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device must name a usable device; got {arguments.device}: {error}")


def read_batches(text: bytes, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """(steps, rows, length) bytes from the start of the text, which is repeated if it is short."""
    wanted = shape[0] * shape[1] * shape[2]
    text = (text * -(-wanted // len(text)))[:wanted]
    return torch.tensor(list(text), device=device).view(shape)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
