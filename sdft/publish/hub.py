"""The Hugging Face Hub: whether one is logged in, and the upload of a folder."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from sdft.errors import UserError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*")


def refuse_name(to: str) -> None:
    """Raise UserError for what cannot be the name of a repository."""
    if not REPOSITORY.fullmatch(to) or ".." in to or "--" in to or len(to) > 96:
        raise UserError(f"to={to}: is no repository of the Hub; write USER/NAME, of letters, digits, dots and dashes")


def upload(folder: Path, to: str, private: bool) -> str:
    """Upload a folder, and nothing else, to a model repository, which is made if there is none; returns its address.

    private: of a new repository. Raises UserError, one sentence, without a login and for all that the Hub refuses.
    """
    again = f"python -m sdft.publish run={folder} to={to}"
    ready = f"the folder {folder} is ready"
    try:
        token = get_token()
        if not token:
            raise UserError(
                f"to={to}: not logged in to the Hugging Face Hub; {ready}. Log in with 'hf auth login' (or set "
                f"HF_TOKEN), then: {again}"
            )
        api = HfApi(token=token)
        address = api.create_repo(to, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=to, folder_path=folder, repo_type="model", commit_message="Upload with sdft")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        said = " ".join((error.server_message or str(error)).split())[:200]
        raise UserError(f"to={to}: the Hub refused the upload ({status}: {said}); {ready}. Again: {again}") from error
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        said = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"to={to}: the upload failed ({said}); {ready}. Again: {again}") from error
    return str(address)
