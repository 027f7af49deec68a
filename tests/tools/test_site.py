from pathlib import Path

from tools.site import on_config, repository


def test_the_address_of_the_code_is_the_project_s(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\nname = "x"\n')
    assert repository(project) is None
    project.write_text('[project.urls]\nHomepage = "https://x"\nRepository = "https://code"\n')
    assert repository(project) == "https://code"
    config = {"config_file_path": str(tmp_path / "mkdocs.yml")}
    assert on_config(config)["repo_url"] == "https://code"


def test_the_social_card_has_the_size_that_its_page_says(repository: Path) -> None:
    """Bytes 16 to 24 of a PNG are its width and height."""
    head = (repository / "docs/assets/card.png").read_bytes()[:24]
    size = [int.from_bytes(head[i : i + 4], "big") for i in (16, 20)]
    page = (repository / "tools/theme/main.html").read_text()
    assert size == [1200, 630]
    assert all(f'content="{pixels}"' in page for pixels in size)
