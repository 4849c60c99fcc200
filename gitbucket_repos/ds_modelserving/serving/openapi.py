"""Describe the routes that FastAPI does not see, so that /openapi.json shows all of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": _FILE},
        "multipart/form-data": {"schema": {"type": "object", "properties": {"file": _FILE}, "required": ["file"]}},
    },
}
_ERROR = {
    "description": "`{error: {type, message, hint}}`",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {name: {"type": "string"} for name in ("type", "message", "hint")},
                    }
                },
            }
        }
    },
}
_PREDICTION = {
    "description": "The prediction; `airloom receipt ID` says what is behind it",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {name: {"type": "string"} for name in ("id", "release", "model_version")},
                "required": ["id", "release", "model_version"],
            }
        }
    },
}
_PICTURE = {"description": "A picture of what the model looked at", "content": {"image/png": {"schema": _FILE}}}


def describe(app: FastAPI) -> None:
    """Add the routes to the app's OpenAPI document."""
    errors = dict.fromkeys(("408", "413", "415", "422", "503"), _ERROR)
    paths = {
        "/predict": {"summary": "Predict from one file", "answer": _PREDICTION},
        "/explain": {"summary": "Show what the model looked at", "answer": _PICTURE},
    }
    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        for path, described in paths.items():
            document["paths"][path] = {
                "post": {
                    "summary": described["summary"],
                    "requestBody": _BODY,
                    "responses": {"200": described["answer"], **errors},
                }
            }
        return document

    app.openapi = openapi  # type: ignore[method-assign]
