"""Files put into the object stores of tests."""

from xattn.runtime.stores import place_of


def upload(folder, url):
    """Copy a local folder below a URL, which is returned."""
    for file in folder.rglob("*"):
        if file.is_file():
            place_of(f"{url}/{file.relative_to(folder).as_posix()}").put(file)
    return url
