"""The owner of a namespace, recorded as a registered model `<namespace>.store` with the store's id
as a tag.

MLflow creates a model and its tags in one transaction, and a name only once. So if two stores claim
a namespace at the same time, one of them gets it, on SQLite, on PostgreSQL and over HTTP.
"""

from __future__ import annotations

from mlflow.exceptions import MlflowException

from ptuning.registry.base import check_owner
from ptuning.registry.mlflow.connection import Connection
from ptuning.registry.names import OWNER, Scope


def check_namespace(to: Connection, scope: Scope, *, claim: bool) -> bool:
    """Check the owner of the scope's namespace; with `claim`, take it if it has none.

    Returns whether the scope's store owns it. Raises RegistryError if another store does.
    """
    try:
        model = to.models.get_registered_model(scope.owner_model)
    except MlflowException as error:
        if not to.is_answer(error, "RESOURCE_DOES_NOT_EXIST"):
            raise
        if not claim:
            return False
        _claim(to, scope)
        model = to.models.get_registered_model(scope.owner_model)
    check_owner(scope, model.tags.get(OWNER))
    return True


def _claim(to: Connection, scope: Scope) -> None:
    try:
        to.models.create_registered_model(
            scope.owner_model,
            tags={OWNER: scope.store_id},
            description="Says which store registers names in this namespace. Do not delete it.",
        )
    except MlflowException as error:
        # Created by another process, or by this request before a retry.
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
