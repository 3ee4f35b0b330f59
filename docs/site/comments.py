"""Lists the fields of a dataclass whose docstring has no list of its own, with their comments."""

import re
from typing import Any

import griffe

_SEE_ABOVE = "see above."


class Comments(griffe.Extension):
    """Writes an `Attributes` section of what stands behind `#` on the lines of the fields."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Once a class and its members are read."""
        told = cls.docstring
        if told is None or "dataclass" not in cls.labels or "Attributes:" in told.value:
            return
        fields = [a for a in cls.attributes.values() if "property" not in a.labels]
        lines = [f"    {field.name}: {_comment(field) or _SEE_ABOVE}" for field in fields]
        if lines:
            before, raises, after = told.value.partition("Raises:\n")
            told.value = "\n".join([before, "Attributes:", *lines, "", raises + after])


def _comment(field: griffe.Attribute) -> str:
    """What stands behind `#`; brackets of shapes stay brackets."""
    source = "\n".join(field.lines)
    return re.sub(r"\s+", " ", source.partition("#")[2]).strip()
