"""`StackConfig`: a stack, and where it connects to or listens, as a pydantic model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from towline.endpoint import Endpoint
from towline.errors import ConfigError, StackError
from towline.stack import Stack
from towline.transport import Transport

from ._kinds import Discreet, faulty
from ._known import LAYERS, TRANSPORTS
from ._shapes import is_list, is_table
from ._sources import PREFIX, Document, faults_of, read_file, read_text
from ._text import EndpointText

__all__ = ["StackConfig"]


class StackConfig(Discreet):
    """Layers, and the endpoint that they are for, read from a file or from the environment.

    It holds the very layers, so ``build`` makes the stack that the same code would have made, and one file describes
    both ends. A field of a model of your own, or the base of one that has further fields, it is as well.

    Read with ``from_file``, ``from_toml``, ``from_json``, ``from_yaml``, ``from_dict`` or ``from_environ``, it raises
    `ConfigError`, which says in which line. As a model (``StackConfig(...)``, ``model_validate``) it raises pydantic's
    ``ValidationError``. Neither shows what was given, since that could be a key.

    Attributes:
        endpoint: where to connect to, or to listen.
        layers: outermost first. In text, each is a table with its ``kind`` and the options that its class takes, or
            the kind alone. A `Reconnect` that says no target has the endpoint.
        transports: in place of those that a `Stack` has by default.

    >>> config = StackConfig.from_toml('''
    ... endpoint = "tcp://localhost:7000"
    ... layers = [{ kind = "heartbeat", interval = "2s", timeout = "6s" }, "framing"]
    ... ''')
    >>> config.build()
    Stack(Heartbeat(interval=2.0, timeout=6.0), Framing())
    >>> StackConfig.from_toml('layers = ["framng"]')
    Traceback (most recent call last):
    ...
    towline.errors.ConfigError: line 1: layers.0: there is no layer of kind 'framng': did you mean 'framing'?
    """

    endpoint: EndpointText | None = None
    layers: tuple[Annotated[Any, LAYERS], ...] = ()
    transports: tuple[Annotated[Transport, TRANSPORTS], ...] | None = None

    def build(self) -> Stack[Any, Any, Any, Any]:
        """The stack."""
        if self.transports is None:
            return Stack(*self.layers)
        return Stack(*self.layers, transports=self.transports)

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        config = handler(_with_target(given))
        try:
            config.build()
        except StackError as error:
            raise faulty(cls.__name__, ("layers",), str(error)) from None
        return config

    # --- sources ------------------------------------------------------------------------------------------------

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        table: str | None = None,
        environ: Mapping[str, str] | None = None,
        prefix: str = PREFIX,
    ) -> Self:
        """Read a file: TOML, JSON or YAML, by the ending of its name. Relative paths in it start at its folder.

        Args:
            path: the file.
            table: read only this table of it, such as ``"tool.towline"``.
            environ: variables that override it, mostly ``os.environ``: ``TOWLINE__LAYERS__0__TTL=5m`` is the option
                ``ttl`` of the first layer. Lists and tables are written as in TOML.
            prefix: what their names begin with.

        Raises:
            ConfigError: if it cannot be read, or is wrong. It names file, place and, for TOML, line.
        """
        return cls._of(read_file(path), table, environ, prefix)

    @classmethod
    def from_toml(cls, text: str, *, table: str | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Read TOML. See `from_file`."""
        return cls._of(read_text(text, "toml"), table, environ)

    @classmethod
    def from_json(cls, text: str, *, table: str | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Read JSON. See `from_file`."""
        return cls._of(read_text(text, "json"), table, environ)

    @classmethod
    def from_yaml(cls, text: str, *, table: str | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Read YAML, with the extra ``yaml`` installed. See `from_file`."""
        return cls._of(read_text(text, "yaml"), table, environ)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, environ: Mapping[str, str] | None = None) -> Self:
        """Read tables that were read elsewhere. See `from_file`."""
        return cls._of(Document(dict(data)), None, environ)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ, *, prefix: str = PREFIX) -> Self:
        """Read the environment alone. See `from_file`."""
        return cls._of(Document({}), None, environ, prefix)

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Make it of what was read.

        Raises:
            ConfigError: if that is wrong.
        """
        try:
            return cls.model_validate(document.data, context={"folder": document.folder})
        except ValidationError as error:
            raise ConfigError(faults_of(error, document)) from None

    @classmethod
    def _of(
        cls, document: Document, table: str | None, environ: Mapping[str, str] | None, prefix: str = PREFIX
    ) -> Self:
        if table is not None:
            document = document.table(table)
        return cls.from_document(document if environ is None else document.with_environ(environ, prefix))


def _with_target(given: Any) -> Any:
    """The same, with the endpoint in each `Reconnect` that has no target, and without what editors put there."""
    if not is_table(given):
        return given
    given = {name: each for name, each in given.items() if name != "$schema"}
    endpoint, layers = given.get("endpoint"), given.get("layers")
    if not isinstance(endpoint, (str, Endpoint)) or not is_list(layers):
        return given

    def aimed(layer: Any) -> Any:
        if layer == "reconnect":
            return {"kind": "reconnect", "target": endpoint}
        if is_table(layer) and layer.get("kind") == "reconnect":
            return {"target": endpoint, **layer}
        return layer

    return {**given, "layers": [aimed(each) for each in layers]}
