"""Files put into the object stores of tests."""

from xattn.runtime.stores import resolve_place


def upload(folder, url):
    """Copy a local folder below a URL, which is returned."""
    for file in folder.rglob("*"):
        if file.is_file():
            resolve_place(f"{url}/{file.relative_to(folder).as_posix()}").put(file)
    return url


class fresh_file_systems:
    """Clients of S3 of their own, which read the environment anew."""

    def __enter__(self):
        from s3fs import S3FileSystem

        self.kept, S3FileSystem._cache = S3FileSystem._cache, {}

    def __exit__(self, *_):
        from s3fs import S3FileSystem

        S3FileSystem._cache = self.kept
