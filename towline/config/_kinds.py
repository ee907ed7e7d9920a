"""How a value of the library is said in text: a kind by name, and the options that its constructor takes.

Nothing is declared twice. The options of a kind are the parameters of what makes it, read from its signature; how each
is read and written follows from its annotation (`as_text`). What text cannot say, such as a function, is for code only:
it keeps its default here, and a value that has another one is refused when it is written.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import threading
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, Self, Union, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic.json_schema import JsonSchemaValue, WithJsonSchema
from pydantic_core import (
    CoreSchema,
    InitErrorDetails,
    PydanticCustomError,
    PydanticSerializationError,
    core_schema,
)

from towline.errors import TowlineError
from towline.text import without_keys
from towline.units import Unit

from ._shapes import is_table
from ._text import shown

__all__ = [
    "TYPES",
    "Choice",
    "CodeOnly",
    "Discreet",
    "Kind",
    "Record",
    "Text",
    "as_text",
    "cleaned",
    "did_you_mean",
    "faulty",
    "refuse",
    "schema_of",
]

NONE: Final = "none"
"""What says None where the default is something else: TOML has no word for it."""

LISTED: Final = 30
"""So many names are listed where none resembles the one that is not known."""


class CodeOnly(Exception):
    """A value that text cannot say. The argument says why."""


# --- what is wrong, without showing what was given ------------------------------------------------------------------


def _reason(kind: str, problem: str) -> PydanticCustomError:
    # The text goes in as a value: braces in it are nobody's placeholders.
    shown = {"problem": without_keys(problem)}
    return PydanticCustomError(kind, "{problem}", shown)  # pyright: ignore[reportArgumentType] -- a literal, there


def refuse(kind: str, problem: str) -> NoReturn:
    """Refuse a value; for `Text.read`."""
    raise _reason(kind, problem)


def faulty(title: str, place: tuple[str | int, ...], problem: str) -> ValidationError:
    """One fault, at a place within what is being read."""
    details = InitErrorDetails(type=_reason("value", problem), loc=place, input=None)
    return ValidationError.from_exception_data(title, [details], hide_input=True)


def cleaned(error: ValidationError, known: Iterable[str]) -> ValidationError:
    """The same error in our words, and with nothing in it of what was given: that may be a key in the wrong place."""
    details: list[InitErrorDetails] = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        kind, place, problem = each["type"], each["loc"], each["msg"]
        if kind == "missing":
            problem = "is missing"
        elif kind == "extra_forbidden":
            kind, problem = "unknown_option", f"there is no such option: {did_you_mean(str(place[-1]), known)}"
        elif kind in ("tuple_type", "list_type"):
            problem = "expected a list"
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            problem = "expected a table"
        elif kind == "invalid_key":
            problem = "the names of options are text: put quotes around it"
        place = tuple(without_keys(part) if isinstance(part, str) else part for part in place)
        details.append(InitErrorDetails(type=_reason(kind, problem), loc=place, input=None))
    return ValidationError.from_exception_data(error.title, details, hide_input=True)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is not known: the one that it resembles, or else all."""
    plain = {each.replace("_", "-").lower(): each for each in known}
    said = name.replace("_", "-").lower()
    begun = [each for each in plain if len(said) > 2 and each.startswith(said)]
    close = begun if len(begun) == 1 else difflib.get_close_matches(said, plain, n=1)
    if close:
        return f"did you mean {plain[close[0]]!r}?"
    if len(plain) > LISTED:
        return "nor one of a similar name"
    return f"known: {', '.join(sorted(plain.values()))}" if plain else "there are none"


# --- values with a text of their own --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Text:
    """An annotation: how a value is read, written, and described to an editor.

    Attributes:
        read: from what a file says, and the folder that relative paths start from, to the value; or refuses.
        write: back, to what JSON has. Raises `CodeOnly` where there are no words.
        schema: JSON Schema.
    """

    read: Callable[[Any, str | None], Any]
    write: Callable[[Any], Any]
    schema: Callable[[GetJsonSchemaHandler], JsonSchemaValue]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def read(value: Any, info: core_schema.ValidationInfo) -> Any:
            context: Mapping[str, Any] = info.context or {}
            return self.read(value, context.get("folder"))

        return core_schema.with_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(self.write)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return self.schema(handler)


def schema_of(annotation: Any, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    """JSON Schema of an annotation within that of another one."""
    # pydantic's handler looks at no annotations, since it is one that asks.
    for each in getattr(annotation, "__metadata__", ()):
        if isinstance(each, Text):
            return each.schema(handler)
        if isinstance(each, WithJsonSchema) and each.json_schema is not None:
            return dict(each.json_schema)
    return handler(TypeAdapter(annotation).core_schema)


def _text_of(annotation: Any) -> Text | None:
    return next((each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, Text)), None)


# --- kinds ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Option:
    """One parameter of a constructor.

    Attributes:
        type: how it is said in text; None where it is for code only.
        default: ``inspect.Parameter.empty`` if it must be given.
        is_made: the default is a new value each time, of which this is one.
    """

    name: str
    type: Any
    default: Any
    is_made: bool = False

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.type)

    @property
    def is_required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def is_default(self, value: object) -> bool:
        if value is self.default or value == self.default:
            return True
        # A random generator, say, equals no other.
        return self.is_made and self.type is None and type(value) is type(self.default)


class _Form(BaseModel):
    """What a file may say of a kind: not a value yet, only a form to fill in."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class Discreet(BaseModel):
    """A model whose errors are in our words, and show nothing of what was given."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Read JSON. What is no JSON is shown as little as what is wrong in it.

        Raises:
            ValidationError: if it is wrong.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise cleaned(error, cls.model_fields) from None

    @model_validator(mode="wrap")
    @classmethod
    def _discreetly(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(given)
        except ValidationError as error:
            raise cleaned(error, cls.model_fields) from None


@dataclass(frozen=True, eq=False)
class Kind:
    """A class whose values a configuration can make.

    Attributes:
        name: how it is called there; empty where there is no choice.
        of: the class.
        make: what makes a value: the class itself, or a function that takes what text can say.
        read: the other way round, the options of a value; by default its attributes.
        types: how options are said whose annotation does not say enough.
        matches: whether a value is of this kind; by default by its class.
        filled: options that must be given, but that something else in the file may give.
    """

    name: str
    of: type
    make: Callable[..., Any]
    read: Callable[[Any], Mapping[str, Any]] | None = None
    types: Mapping[str, Any] = field(default_factory=dict[str, Any])
    matches: Callable[[object], bool] | None = None
    filled: tuple[str, ...] = ()

    def has(self, value: object) -> bool:
        """Whether a value is of this kind."""
        return type(value) is self.of if self.matches is None else self.matches(value)

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """By name, in the order of the constructor."""
        namespace = _namespace(self.make)
        factories = {
            each.name: each.default_factory
            for each in getattr(self.make, "__dataclass_fields__", {}).values()
            if callable(each.default_factory)
        }
        found: dict[str, Option] = {}
        for parameter in inspect.signature(self.make).parameters.values():
            name, default = parameter.name, parameter.default
            if name in factories:
                default = factories[name]()
            said = self.types.get(name) or as_text(
                _evaluated(parameter.annotation, namespace), is_none_default=default is None
            )
            if parameter.kind is parameter.VAR_KEYWORD:
                raise CodeOnly(f"{self.of.__name__} takes options of any name (**{name})")
            if parameter.kind is parameter.VAR_POSITIONAL:
                said, default = None if said is None else _tuple_of(said), ()
            found[name] = Option(name, said, default, name in factories)
        return found

    @cached_property
    def sayable(self) -> Mapping[str, Option]:
        """The options that text can say.

        Raises:
            CodeOnly: if one that must be given is not among them.
        """
        for option in self.options.values():
            if option.type is None and option.is_required:
                raise CodeOnly(f"{self.of.__name__} needs {option.name}, which only code can say")
            if option.name == "kind" and self.name:
                raise CodeOnly(f"{self.of.__name__} has an option called kind, which is what names it")
        return {name: option for name, option in self.options.items() if option.type is not None}

    @cached_property
    def form(self) -> type[BaseModel]:
        """What a file may say of it."""
        fields: dict[str, Any] = {}
        if self.name:
            fields["kind"] = (Literal[self.name], ...)
        for name, option in self.sayable.items():
            if option.is_required and name not in self.filled:
                fields[name] = (option.type, ...)
            elif option.is_required:
                fields[name] = (option.type, None)
            else:
                shown = {"default": self._say(option, option.default)}
                fields[name] = (option.type, Field(default=None, json_schema_extra=cast("Any", shown)))
        form = create_model(self.of.__name__, __base__=_Form, **fields)
        form.__doc__ = (inspect.getdoc(self.make) or "").partition("\n\n")[0].replace("``", "`").replace("\n", " ")
        return form

    def described(self, is_known: bool) -> CoreSchema:
        """What pydantic makes a JSON Schema of: the form, under a name that it can be referred to by."""
        ref = f"{__name__}.{self.of.__name__ if self.make is self.of else self.name}:{id(self)}"
        if is_known:
            return core_schema.definition_reference_schema(ref)
        return cast("CoreSchema", {**self.form.__pydantic_core_schema__, "ref": ref})

    def from_text(self, given: Mapping[str, Any], folder: str | None) -> Any:
        """Make a value of what a file says.

        Raises:
            ValidationError, PydanticCustomError: if it says anything wrong. Neither shows what it said.
        """
        try:
            form = self.form
        except CodeOnly as why:
            refuse("code_only", f"{why}: add it to the stack that build() gives")
        except Exception as error:  # of a foreign class, whose author has to see it
            refuse("kind", f"{self.of.__name__} cannot be configured: {type(error).__name__}: {error}")
        try:
            filled = form.model_validate(dict(given), context={"folder": folder})
        except ValidationError as error:
            raise cleaned(error, self.sayable) from None
        chosen = {name: getattr(filled, name) for name in filled.model_fields_set if name != "kind"}
        for name in self.filled:
            if name not in chosen:
                raise faulty(self.of.__name__, (name,), "is missing")
        try:
            return self._made(chosen)
        except (TowlineError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = str(error)
            # Where it begins with an option, as most do, that is where it belongs.
            first = re.match(r"\w*", problem)
            place = (first[0],) if first is not None and first[0] in self.sayable else ()
            raise faulty(self.of.__name__, place, problem) from None

    def _made(self, chosen: dict[str, Any]) -> Any:
        first: list[Any] = []
        for parameter in inspect.signature(self.make).parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                first += chosen.pop(parameter.name, ())
            elif parameter.kind is parameter.POSITIONAL_ONLY and parameter.name in chosen:
                first.append(chosen.pop(parameter.name))
        return self.make(*first, **chosen)

    def to_text(self, value: Any) -> dict[str, Any]:
        """What a file would say of a value: the kind, and the options that are not at their default.

        Raises:
            CodeOnly: if there are no words for it.
        """
        if not self.has(value):
            raise CodeOnly(f"a {type(value).__name__} is for code only")
        said: dict[str, Any] = {"kind": self.name} if self.name else {}
        sayable = self.sayable
        current = self._current(value)
        for name, option in self.options.items():
            if option.is_default(current[name]):
                continue
            if name not in sayable:
                raise CodeOnly(f"{self.of.__name__}.{name} is for code only")
            said[name] = self._say(option, current[name])
        return said

    def _current(self, value: Any) -> Mapping[str, Any]:
        """The options of a value."""
        if self.read is not None:
            read = self.read(value)
            return {name: read.get(name, option.default) for name, option in self.options.items()}
        lost = [name for name in self.options if not hasattr(value, name)]
        if lost:
            raise CodeOnly(f"a {self.of.__name__} does not keep its {lost[0]}, so it cannot be written")
        return {name: getattr(value, name) for name in self.options}

    def _say(self, option: Option, value: Any) -> Any:
        if value is None:
            return None if option.default is None else NONE
        try:
            return option.adapter.dump_python(value, mode="json", warnings="error")
        except PydanticSerializationError as error:
            why = f": {error.__cause__}" if isinstance(error.__cause__, CodeOnly) else " is for code only"
            raise CodeOnly(f"{self.of.__name__}.{option.name}{why}") from None
        except CodeOnly as error:
            raise CodeOnly(f"{self.of.__name__}.{option.name}: {error}") from None


class Record(Text):
    """An annotation: a value of one class, as a table of its options."""

    def __init__(self, kind: Kind) -> None:
        def read(value: Any, folder: str | None) -> Any:
            if kind.has(value):
                return value
            if not is_table(value):
                refuse("record", f"expected a table with {', '.join(kind.sayable)}")
            return kind.from_text(value, folder)

        super().__init__(
            read, kind.to_text, lambda handler: handler(core_schema.nullable_schema(kind.described(False)))["anyOf"][0]
        )


class Choice(Text):
    """An annotation: one of several kinds, as a table that names it, or as its name alone.

    Args:
        what: what it is, for messages: "layer".
        fits: whether a class of another package is one.
        kinds: those of this library, by name.
        group: the entry points by which other packages add theirs.
        as_kind: how such a class becomes a kind.
    """

    def __init__(
        self,
        what: str,
        fits: Callable[[type], bool],
        kinds: Mapping[str, Kind],
        group: str | None = None,
        as_kind: Callable[[str, type], Kind] = lambda name, cls: Kind(name, cls, cls),
    ) -> None:
        super().__init__(self._read, self._write, self._schema)
        # The dataclass is frozen; these do not change either.
        self.__dict__.update(
            what=what, fits=fits, own=kinds, group=group, as_kind=as_kind, foreign={}, state=threading.local()
        )

    what: str
    fits: Callable[[type], bool]
    own: Mapping[str, Kind]
    group: str | None
    as_kind: Callable[[str, type], Kind]
    foreign: dict[str, Kind]
    state: threading.local  # whether this thread makes a schema of it

    def names(self) -> list[str]:
        """All kinds, those of other packages too, without importing them."""
        return list(dict.fromkeys((*self.own, *(each.name for each in self._points()))))

    def find(self, name: str) -> Kind | None:
        """A kind by its name. One of this library's comes before another package's of the same name.

        Raises:
            PydanticCustomError: if another package has it, and it cannot be used.
        """
        found = self.own.get(name) or self.foreign.get(name)
        if found is None:
            point = next((each for each in self._points() if each.name == name), None)
            if point is not None:
                found = self.foreign[name] = self._loaded(point)
        return found

    def kind_of(self, value: object) -> Kind | None:
        """The kind of a value."""
        for kind in (*self.own.values(), *self.foreign.values()):
            if kind.has(value):
                return kind
        package = type(value).__module__.partition(".")[0]
        for point in self._points():
            if point.module.partition(".")[0] == package:
                found = self.find(point.name)
                if found is not None and found.has(value):
                    return found
        return None

    def _points(self) -> Iterable[EntryPoint]:
        return () if self.group is None else entry_points(group=self.group)

    def _loaded(self, point: EntryPoint) -> Kind:
        whose = "another package" if point.dist is None else f"the package {point.dist.name}"
        try:
            loaded: object = point.load()
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            refuse("kind", f"the {self.what} {point.name!r} of {whose} cannot be imported: {reason}")
        if not isinstance(loaded, type) or not self.fits(loaded):
            refuse("kind", f"{point.name!r} of {whose} is no {self.what}")
        return self.as_kind(point.name, loaded)

    def _read(self, value: Any, folder: str | None) -> Any:
        if isinstance(value, str):
            value = {"kind": value}
        if not is_table(value):
            try:
                self._write(value)
            except CodeOnly as why:
                refuse("code_only", str(why))
            return value
        name = value.get("kind")
        if not isinstance(name, str):
            refuse("kind", f"this {self.what} says no kind; known: {', '.join(sorted(self.names()))}")
        kind = self.find(name)
        if kind is None:
            refuse("kind", f"there is no {self.what} of kind {shown(name)}: {did_you_mean(name, self.names())}")
        return kind.from_text(value, folder)

    def _write(self, value: Any) -> Any:
        kind = self.kind_of(value)
        if kind is None:
            raise CodeOnly(f"a {type(value).__name__} is no {self.what} that a configuration knows")
        said = kind.to_text(value)
        return said["kind"] if len(said) == 1 else said

    def _schema(self, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        parts: list[CoreSchema | tuple[CoreSchema, str]] = []
        alone: list[str] = []
        # As the parts of a chain are: pydantic would go round for ever.
        is_within_itself = getattr(self.state, "is_described", False)
        self.state.is_described = True
        try:
            for name in self.names():
                try:
                    kind = self.find(name)
                    assert kind is not None  # it is one of the names
                    parts.append(kind.described(is_within_itself))
                except Exception:  # for code only; or another package's, of another sort or broken
                    continue
                if all(name in kind.filled or not option.is_required for name, option in kind.sayable.items()):
                    alone.append(kind.name)
            parts.append(core_schema.literal_schema(alone))
            return {**handler(core_schema.union_schema(parts)), "description": f"A {self.what}."}
        finally:
            self.state.is_described = is_within_itself


# --- from annotations -----------------------------------------------------------------------------------------------

TYPES: Final[dict[Any, Any]] = {str: str}
"""How the types that stand in annotations are said in text. `towline.config._known` adds those of the library."""


def as_text(annotation: Any, *, is_none_default: bool = True) -> Any:
    """How values of an annotation are said in text, as an annotation for pydantic; None where only code can say them.

    Of a union, what text can say is left: ``int | Limiter`` is a whole number.
    """
    if isinstance(annotation, InitVar):
        annotation = cast("Any", annotation).type
    if annotation in TYPES:
        return TYPES[annotation]
    origin = get_origin(annotation)
    if origin is Annotated:
        unit = next((each for each in annotation.__metadata__ if isinstance(each, Unit)), None)
        return annotation if unit is None else TYPES[unit]
    if origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        return _one_of(get_args(annotation), is_none_default)
    if origin is tuple and get_args(annotation)[1:] == (...,):
        inner: Any = as_text(get_args(annotation)[0])
        return None if inner is None else _tuple_of(inner)
    return None


def _tuple_of(said: Any) -> Any:
    return tuple.__class_getitem__((said, ...))  # written as usual, checkers take it for a type


def _one_of(members: tuple[Any, ...], is_none_default: bool) -> Any:
    said = [each for each in map(as_text, members) if each is not None]
    if type[Exception] in members:  # the classes, functions and tuples that `Errors` is are one thing in text
        said = [TYPES[type[Exception]]]
    takes_none = type(None) in members
    if not said or (len(said) == 1 and not takes_none):
        return said[0] if said else None
    return Annotated[Any, _Either(said, takes_none=takes_none, says_none=takes_none and not is_none_default)]


class _Either(Text):
    """An annotation: a plain value, or a table; or None, which has a word where it is not the default."""

    def __init__(self, said: list[Any], *, takes_none: bool, says_none: bool) -> None:
        texts = {id(each): _text_of(each) for each in said}
        adapters = {id(each): TypeAdapter[Any](each) for each in said}
        tables = [each for each in said if isinstance(texts[id(each)], (Record, Choice))]
        plain = [each for each in said if each not in tables]

        def fitting(value: Any) -> TypeAdapter[Any]:
            is_plain = isinstance(value, (str, int, float))
            for each in tables:
                text = texts[id(each)]
                if not is_plain or (isinstance(text, Choice) and value in text.names()):
                    return adapters[id(each)]
            return adapters[id((plain or tables)[0])]

        def read(value: Any, folder: str | None) -> Any:
            if (takes_none and value is None) or (says_none and value == NONE):
                return None
            return fitting(value).validate_python(value, context={"folder": folder})

        def write(value: Any) -> Any:
            if value is None:
                return NONE if says_none else None
            try:
                return fitting(value).dump_python(value, mode="json", warnings="error")
            except PydanticSerializationError as error:
                if isinstance(error.__cause__, CodeOnly):
                    raise error.__cause__ from None
                raise

        def schema(handler: GetJsonSchemaHandler) -> JsonSchemaValue:
            parts = [schema_of(each, handler) for each in (*plain, *tables)]
            if says_none:
                parts.append({"const": NONE})
            if takes_none:
                parts.append({"type": "null"})
            return {"anyOf": parts}

        super().__init__(read, write, schema)


def _namespace(make: Callable[..., Any]) -> dict[str, Any]:
    """Where the names in its annotations mean something."""
    module = sys.modules.get(make.__module__)
    return {**vars(typing), **({} if module is None else vars(module))}


def _evaluated(annotation: Any, namespace: dict[str, Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, namespace)  # the author's own code, as `typing.get_type_hints` evaluates it
    except Exception:
        return None  # mostly a name that only type checkers import: what it stands for is made in code
