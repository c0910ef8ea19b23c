"""The one exception of this package: what is wrong, which value, what to do about it."""


class CodeError(ValueError):
    """A code, frame or tensor that cannot be built, encoded or decoded as asked."""
