"""What a base's files say of its licence."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from glm_peft.provenance.licences import read_licence


def licence_of(folder: Path, **files: str) -> dict[str, str]:
    for name, text in files.items():
        (folder / name.replace("_md", ".md")).write_text(text, encoding="utf-8")
    return read_licence(SimpleNamespace(model_name_or_path=str(folder)))


CARD = "---\nlanguage: zh\n{}---\n# A model\n"
OTHER = "license: other\nlicense_name: glm-4\nlicense_link: https://example.org/licence\n"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, {}),
        ({"README_md": CARD.format("license: mit\n")}, {"license": "mit"}),
        (
            {"README_md": CARD.format(OTHER)},
            {"license": "other", "license_name": "glm-4", "license_link": "https://example.org/licence"},
        ),
        ({"README_md": CARD.format("")}, {}),
        ({"README_md": "no metadata\nlicense: mit\n"}, {}),
        ({"README_md": "---\n- a\n- list\n---\n"}, {}),
        ({"README_md": "---\nlicense: [broken\n---\n"}, {}),
        ({"README_md": CARD.format("license: 3\n")}, {}),
        ({"LICENSE": "\n    Apache License\n  Version 2.0, January 2004\n"}, {"license": "apache-2.0"}),
        ({"LICENSE": "MIT License\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "The model's own terms"}, {"license": "other", "license_file": "LICENSE"}),
        ({"LICENSE": "MIT License", "MODEL_LICENSE": "Terms"}, {"license": "other", "license_file": "MODEL_LICENSE"}),
        ({"LICENSE": "Terms", "README_md": CARD.format("license: mit\n")}, {"license": "mit"}),
    ],
)
def test_the_licence_is_what_the_files_say(files, expected, tmp_path):
    assert licence_of(tmp_path, **files) == expected


def test_a_base_that_cannot_be_reached_has_no_known_licence():
    assert read_licence(SimpleNamespace(model_name_or_path="somebody/base-that-is-not-here")) == {}
