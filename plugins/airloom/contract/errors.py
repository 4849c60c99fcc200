"""The errors that stage code may raise or meet: what `airloom.errors` is to the platform."""

from airloom.errors import AirloomError, ConflictError, ContractError, NotFoundError

__all__ = ["AirloomError", "ConflictError", "ContractError", "NotFoundError"]
