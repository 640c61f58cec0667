"""What can go wrong, by kind. Each message is one line: what, which value, what would be right."""


class Lfm2VlError(Exception):
    """Base of every error that this package raises on purpose."""


class ModelNotFoundError(Lfm2VlError, FileNotFoundError):
    """A folder, repository or file of a model is not there."""


class ConfigError(Lfm2VlError, ValueError):
    """A configuration file is unreadable, unknown or contradicts itself."""


class WeightsError(Lfm2VlError, ValueError):
    """Weights are missing, unknown, misshapen or damaged."""


class ImageError(Lfm2VlError, ValueError):
    """An image cannot be found, read or processed."""


class SourceError(Lfm2VlError, ValueError):
    """A camera, screen, film, stream or folder of pictures cannot be found or read."""


class PromptError(Lfm2VlError, ValueError):
    """A prompt, a conversation or a generation setting makes no sense."""


class AnswerError(Lfm2VlError, ValueError):
    """An answer does not hold what was asked for, such as a tool call or a JSON object."""


class ConvertError(Lfm2VlError, ValueError):
    """A checkpoint cannot be converted as asked, or the output has no place."""


class DataError(Lfm2VlError, ValueError):
    """Training data cannot be used; names file and line."""


class TrainError(Lfm2VlError, ValueError):
    """A training run or an adapter makes no sense, or does not fit its model."""


class OutputError(Lfm2VlError, ValueError):
    """A file of answers cannot be used."""


class SnapshotError(Lfm2VlError, ValueError):
    """A saved session is damaged, of another version, or of another model."""


def one_line(name: str) -> str:
    """A name for messages: printable, and shortened if somebody took a content for a name."""
    name = name if name and name.isprintable() else repr(name)
    return name if len(name) <= 500 else f"{name[:200]}…{name[-100:]}"


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return one_line(text) if text else type(error).__name__
