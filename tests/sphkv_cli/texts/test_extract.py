"""Plain texts out of an R database, tagged words and HTML, each made here byte by byte."""

import struct
import zlib

import pytest

from sphkv_cli.texts.extract import (
    brown_categories,
    faq_sections,
    novels,
    strings_of_rdb,
    text_of_html,
    untagged,
)


def entry(strings: list[str], r_type: int = 16) -> bytes:
    """One entry as R's saveRDS and lazy loading lay it out (R Internals, section 1.8)."""
    body = b"X\n" + struct.pack(">iiii", 3, 0x040200, 0x030500, 5) + b"UTF-8"
    body += struct.pack(">ii", r_type, len(strings))
    for text in strings:
        body += struct.pack(">ii", 0x00040009, len(text.encode())) + text.encode()
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_every_entry_of_a_database_is_read_in_order() -> None:
    emma, other = ["EMMA", "", "clever, and rïch"], ["Persuasion"]
    assert list(strings_of_rdb(entry(emma) + entry(other))) == [emma, other]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (entry(["a"])[:-3], "should have"),
        (entry(["a"]) + b"\0\0", "cut off"),
        (b"\0\0\0\1plain text", "no zlib stream"),
        (entry(["a"], r_type=19), "R type 19"),
    ],
)
def test_a_damaged_database_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        list(strings_of_rdb(content))


def test_novels_are_named_by_their_first_line() -> None:
    files = {"./usr/lib/R/x/data/Rdata.rdb": entry(["PRIDE AND PREJUDICE", "", "It is"])}
    assert novels(files) == {"pride_and_prejudice.txt": "PRIDE AND PREJUDICE\n\nIt is\n"}


def test_tags_go_and_punctuation_returns_to_its_word() -> None:
    tagged = (
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, 1/2/cd ./.\n\n\nIt/pps\n"
    )
    assert untagged(tagged) == 'The jury said "no evidence", 1/2.\n\nIt\n'


def test_brown_samples_are_joined_by_category() -> None:
    files = {
        "package/cats.txt": b"ca01 news\nca02 news\nce01 hobbies\n",
        "package/ca01": b"One/cd ./.",
        "package/ca02": b"Two/cd ./.",
        "package/ce01": b"Wood/nn ./.",
    }
    assert brown_categories(files) == {"news.txt": "One.\n\nTwo.\n", "hobbies.txt": "Wood.\n"}


def test_a_page_loses_its_markup_and_keeps_its_paragraphs() -> None:
    page = (
        "<html><head><title>no</title></head><body><script>x<1</script><h1>F.1 &amp; more</h1>\n"
        "<p>A <b>bold</b>\nword</p><p>next</p><!-- <p>gone</p> --></body></html>"
    )
    assert text_of_html(page) == "F.1 & more\n\nA bold word\n\nnext\n"


def test_pages_of_a_chapter_are_one_text_and_others_are_left_out() -> None:
    files = {
        "./usr/share/doc/anarchism/html/secA2.html": b"<p>two</p>",
        "./usr/share/doc/anarchism/html/secA1.html": b"<p>one</p>",
        "./usr/share/doc/anarchism/html/append1.html": b"<p>no</p>",
    }
    assert faq_sections(files) == {"secA.txt": "one\n\ntwo\n"}
