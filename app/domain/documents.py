"""Registry documents, by kind: what people write in YAML and what a revision holds."""

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field

from app.domain.document_parts import DocumentPart, Metadata, Name, VersionLabel
from app.domain.route_documents import RouteSpec, RouteStatus
from app.domain.version_documents import ModelVersionSpec
from app.domain.view_documents import FeatureViewSpec


class ModelSpec(DocumentPart):
    """A model: an owner, and names that move between its versions."""

    owner: str = Field(min_length=1)
    aliases: Mapping[Name, VersionLabel] = {}


class ModelVersion(DocumentPart):
    """A ModelVersion document."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["ModelVersion"]
    metadata: Metadata
    spec: ModelVersionSpec


class Model(DocumentPart):
    """A Model document; its name is the model's."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["Model"]
    metadata: Metadata
    spec: ModelSpec


class FeatureView(DocumentPart):
    """A FeatureView document; its name is the view's."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["FeatureView"]
    metadata: Metadata
    spec: FeatureViewSpec


class Route(DocumentPart):
    """A Route document."""

    api_version: Literal["modelbroker.dev/v1alpha1"] = Field(alias="apiVersion")
    kind: Literal["Route"]
    metadata: Metadata
    spec: RouteSpec
    status: RouteStatus | None = None


Document = ModelVersion | Model | FeatureView | Route
KINDS: Final[Mapping[str, type[Document]]] = {
    "FeatureView": FeatureView,
    "Model": Model,
    "ModelVersion": ModelVersion,
    "Route": Route,
}


def item_label(item: object, index: int) -> str:
    """How messages and differences call an item of a list: by what names it where it has a name, else by its place.

    >>> item_label({"version": "3", "weight": 90}, 0), item_label("http://127.0.0.1:1", 2)
    ('3', '2')
    """
    if isinstance(item, Mapping):
        for key in ("name", "ref", "version", "code"):
            if isinstance(item.get(key), str):
                return str(item[key])
    return str(index)
