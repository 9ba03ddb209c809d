"""How an error is said: "error: " and its first problem on one line, the others in a column below."""


def said(error: Exception) -> str:
    """The text behind "error: "."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        # A full disk, a file where a folder should be: what the system says of which file.
        text = (
            f"{error.filename2 or error.filename}: {error.strerror.lower()}; give another place, or "
            "make room or change its permissions there"
        )
    return text.replace("\n", "\n" + " " * len("error: "))
