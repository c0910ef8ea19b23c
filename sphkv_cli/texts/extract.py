"""Plain texts out of what the packages hold: an R database, tagged words, HTML pages.

R database (.rdb): entries of a big-endian length and a zlib stream each; an entry here is an XDR
serialisation ("X\\n", version 3) of one vector of strings: R Internals, section 1.8.
"""

import html
import re
import struct
import zlib
from collections.abc import Iterator, Mapping

_STRING_VECTOR, _STRING = 16, 9
_SPACE_BEFORE = re.compile(r" +([.,;:?!)\]])")
_MARKUP = re.compile(r"<(script|style|head)\b.*?</\1>|<!--.*?-->", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"</?(p|h\d|li|ul|ol|div|blockquote|br|tr)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"<[^>]+>")


def strings_of_rdb(content: bytes) -> Iterator[list[str]]:
    """The string vector of every entry, in order.

    Raises:
        ValueError: not such a database.
    """
    at = 0
    while at < len(content):
        if at + 4 > len(content):
            raise ValueError("an entry is cut off")
        (n_bytes,) = struct.unpack_from(">I", content, at)
        stream = zlib.decompressobj()
        try:
            body = stream.decompress(content[at + 4 :])
        except zlib.error as error:
            raise ValueError(f"an entry is no zlib stream ({error})") from error
        if len(body) != n_bytes or not stream.eof:
            raise ValueError(f"an entry has {len(body)} bytes, it should have {n_bytes}")
        yield _string_vector(body)
        at = len(content) - len(stream.unused_data)


def _string_vector(body: bytes) -> list[str]:
    version, _, _, n_encoding = struct.unpack_from(">iiii", body, 2)
    if body[:2] != b"X\n" or version != 3:
        raise ValueError("an entry is not serialised as XDR, version 3")
    at = 18 + n_encoding
    flags, n_strings = struct.unpack_from(">ii", body, at)
    if flags & 0xFF != _STRING_VECTOR:
        raise ValueError(f"an entry has the R type {flags & 0xFF}, not a vector of strings")
    at += 8
    found = []
    for _ in range(n_strings):
        flags, n_bytes = struct.unpack_from(">ii", body, at)
        at += 8
        if flags & 0xFF != _STRING or not 0 <= n_bytes <= len(body) - at:
            raise ValueError("an entry holds something else than strings")
        found.append(body[at : at + n_bytes].decode("utf-8"))
        at += n_bytes
    return found


def untagged(content: str) -> str:
    """The running text of `word/tag` tokens; quotes and punctuation where a reader expects them."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", content):
        words = [token.rpartition("/")[0] or token for token in paragraph.split()]
        text = " ".join(words).replace("`` ", '"').replace(" ''", '"')
        text = _SPACE_BEFORE.sub(r"\1", text)
        if text:
            paragraphs.append(text)
    return "\n\n".join(paragraphs) + "\n"


def text_of_html(content: str) -> str:
    """The text of a page: a paragraph per block element, entities resolved."""
    body = _BREAK.sub("\n\n", _MARKUP.sub(" ", content))
    text = html.unescape(_TAG.sub("", body))
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part) + "\n"


def novels(files: Mapping[str, bytes]) -> dict[str, str]:
    """One text per novel of the package janeaustenr; named by its own first line."""
    (database,) = (content for name, content in files.items() if name.endswith("/Rdata.rdb"))
    found = {}
    for lines in strings_of_rdb(database):
        name = re.sub(r"[^a-z]+", "_", lines[0].lower()).strip("_")
        found[f"{name}.txt"] = "\n".join(lines) + "\n"
    return found


def brown_categories(files: Mapping[str, bytes]) -> dict[str, str]:
    """One text per category of the Brown corpus (news, hobbies, ...), its samples in order."""
    by_name = {name.rpartition("/")[2]: content for name, content in files.items()}
    found: dict[str, list[str]] = {}
    for line in by_name["cats.txt"].decode("utf-8").splitlines():
        if line.strip():
            sample, category = line.split()
            found.setdefault(category, []).append(untagged(by_name[sample].decode("utf-8")))
    return {f"{category}.txt": "\n".join(texts) for category, texts in found.items()}


def faq_sections(files: Mapping[str, bytes]) -> dict[str, str]:
    """One text per chapter (secA, secB, ...) of An Anarchist FAQ, its pages in order."""
    found: dict[str, list[str]] = {}
    for path in sorted(files):
        match = re.fullmatch(r".*/html/(sec[A-J])[^/]*\.html", path)
        if match:
            page = text_of_html(files[path].decode("utf-8", errors="replace"))
            found.setdefault(match[1], []).append(page)
    return {f"{section}.txt": "\n".join(pages) for section, pages in found.items()}
