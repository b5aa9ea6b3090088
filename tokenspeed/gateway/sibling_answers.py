# SPDX-License-Identifier: MIT
"""What a gateway tells the others when they ask: what it keeps, and what it has counted.

Questions come from gateways alone and are as `siblings.py` and the handlers make them.
"""

import time
from typing import Any

from tokenspeed.gateway.service import Service
from tokenspeed.gateway.sessions_routes import find_session, sessions_of


def answer(service: Service, number: int, question: dict[str, Any]) -> Any:
    """Gateway `number`'s answer, as JSON has it. `ValueError` for what is no question."""
    match question["ask"]:
        case "has":
            return has(service, question), number
        case "metrics":
            return service.metrics.counted()
        case "watch":
            return service.watch.own(time.monotonic())
        case "sessions":
            return sessions_of(service, question["scope"])
    raise ValueError("another gateway asks what is unknown here")


def has(service: Service, question: dict[str, Any]) -> bool:
    """Whether a session, a response or a response's item of that id is here."""
    tenant, store = question["of"], service.responses
    match question:
        case {"session": key, "scope": scope}:
            return find_session(service, tenant, scope, key) is not None
        case {"response": response_id}:
            running = (tenant, response_id) in store.running
            return running or store.get(tenant, response_id) is not None
        case {"item": item_id}:
            return store.find_item(tenant, item_id) is not None
    return False
