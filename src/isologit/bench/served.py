"""What a server says of itself before it is measured: whether it is there, and the names of its models."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp

from isologit.bench.load import ServerError, nobody_answers

_ASK_S = 10.0


async def served_models(server_url: str, headers: Mapping[str, str]) -> list[str]:
    """Names by `/v1/models`, the main one first. Raises ServerError when it has none, or nobody answers at all."""
    if why := await nobody_answers(server_url):
        raise ServerError(why)
    url = f"{server_url}/v1/models"
    timeout = aiohttp.ClientTimeout(total=_ASK_S)
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session, session.get(url) as response:
            if response.status in (401, 403):
                raise ServerError(f"{url}: HTTP {response.status}; give the server's key with --api-key")
            response.raise_for_status()
            found = await response.json(content_type=None)
            return [str(found["data"][0]["id"]), *(str(model["id"]) for model in found["data"][1:])]
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError(f"{url}: does not name a model ({error}); name it with --served-model-name") from None
