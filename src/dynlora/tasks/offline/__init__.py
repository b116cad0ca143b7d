"""Models and data that come in packages of public registries, for machines without the hub."""

from datasets import DatasetDict

from dynlora.tasks.typed_fields import RecipeError


def offline_model(name: str) -> str:
    """Folder of the carrier ``name``, for ``model: offline:NAME``.

    Raises:
        RecipeError: there is no such carrier, or it was not fetched yet.
    """
    raise RecipeError(f"there is no offline model {name!r}.")


def offline_data(name: str) -> DatasetDict:
    """Splits of the carrier ``name``, for ``data: {name: offline:NAME}``.

    Raises:
        RecipeError: there is no such carrier, or it was not fetched yet.
    """
    raise RecipeError(f"there is no offline data set {name!r}.")
