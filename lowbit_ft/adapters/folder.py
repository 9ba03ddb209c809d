"""The files of an adapter folder as PEFT names them, and the one that is never read."""

from pathlib import Path

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


def refuse_pickle(folder: Path) -> None:
    """ValueError when a folder has its tensors only as a pickle, which may run code when it is read."""
    if (folder / PICKLE_FILE).exists() and not (folder / TENSOR_FILE).exists():
        raise ValueError(
            f"{folder / PICKLE_FILE}: a pickle file, which is never read here; "
            f"save the adapter as {TENSOR_FILE} (save_pretrained's default)"
        )
