# SPDX-License-Identifier: Apache-2.0
"""Sizes and CPU lists."""

import pytest

from ublkd import units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("512B", 512),
        ("8k", 8192),
        ("8K", 8192),
        ("8KiB", 8192),
        ("8KB", 8000),
        ("512M", 512 << 20),
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        (" 1.5G ", 3 << 29),
        ("1.5kB", 1500),
        ("2T", 2 << 40),
        ("9007199254740993", (1 << 53) + 1),
        ("7E", 7 << 60),
    ],
)
def test_size_is_parsed(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "G",
        "-1",
        "+1",
        "1q",
        "1KK",
        "1.G",
        ".5G",
        "1.5.5G",
        "1e3",
        "0x10",
        "1iB",
        "1 2",
        "K1",
        "\u0663",
        "1,5G",
    ],
)
def test_bad_size_names_the_forms(text: str) -> None:
    with pytest.raises(ValueError, match="512M, 4GiB"):
        units.parse_size(text)


def test_size_of_a_fraction_of_a_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        units.parse_size("1.3K")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1024, "1 KiB"),
        (4 << 30, "4 GiB"),
        (3 << 29, "1.5 GiB"),
        ((1 << 30) + 1, "1 GiB"),
        (10**12, "931.3 GiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_size_is_formatted(size: int, text: str) -> None:
    assert units.format_size(size) == text


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1000, 1024, 1536, 1 << 20, 5 << 30, (1 << 53) + 1, 3 << 60])
def test_exact_size_parses_back(size: int) -> None:
    assert units.parse_size(units.exact_size(size)) == size


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-3,8", [0, 1, 2, 3, 8]), ("5, 1", [5, 1]), ("2,2", [2, 2])],
)
def test_cpus_are_parsed_in_order(text: str, cpus: list[int]) -> None:
    assert units.parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", ",", "1,", "a", "3-1", "1-", "-1", "1-2-3", "0-4294967295", "99999999"])
def test_bad_cpus_name_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="0-3,8"):
        units.parse_cpus(text)


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8", "5,1", "8,0-2", "2,2"])
def test_cpus_round_trip(text: str) -> None:
    assert units.format_cpus(units.parse_cpus(text)) == text
