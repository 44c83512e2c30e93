"""The record of the set that an ingest writes: new, or the store's own."""

from dataclasses import replace
from pathlib import Path

from actstore.ingest.model import LoadedModel
from actstore.ingest.probe import array_specs, choose_dtypes
from actstore.ingest.settings import IngestSettings
from actstore.store.blobs import LocalBlobs
from actstore.store.errors import ErrorKind, StoreConflict
from actstore.store.layout import ArraySpec
from actstore.store.manifest import SetRecord, StoreManifest, replaced_arrays
from actstore.store.plan import Plan
from actstore.store.publishing import BASE_SET
from actstore.store.vocabulary import PassType

__all__ = ["require_same_objective", "set_record_of"]


def set_record_of(
    loaded: LoadedModel,
    settings: IngestSettings,
    blobs: LocalBlobs,
    plan: Plan,
    sets: dict[str, SetRecord],
) -> SetRecord:
    """The store's own record of the set, or one with dtypes probed on the first plan."""
    name = settings.set_name
    objective = settings.chosen_objective
    wanted = [location.label for location in settings.chosen]
    wanted += [f"{location}/{PassType.BACKWARD}" for location in settings.chosen_gradients]
    if name in sets:
        stored = [_label(spec) for spec in sets[name].arrays]
        held = sets[name].objective
        if objective is not None and held not in (None, objective.name):
            raise StoreConflict(
                f"Set {name!r} of {blobs.root} holds the gradients of {held}; this run asks for "
                f"those of {objective.name}. Give them a set of their own with --set.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )
        if stored != wanted:
            raise StoreConflict(
                f"{blobs.root} stores {', '.join(stored)} in set {name!r}; this run asks for "
                f"{', '.join(wanted)}. "
                "Repeat the store's own locations, or ingest into another path.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )
        return sets[name]
    for other, record in sets.items():
        gradients = {_label(spec) for spec in record.arrays if spec.objective is not None}
        again = sorted(gradients.intersection(wanted))
        if objective is not None and record.objective == objective.name and again:
            raise StoreConflict(
                f"Set {other!r} of {blobs.root} stores {', '.join(again)} of {objective.name} "
                "already. Name other locations with --gradients.",
                kind=ErrorKind.CONFIG_CONFLICT,
            )
    arrays = array_specs(
        loaded,
        choose_dtypes(loaded, settings, plan),
        plan.config.segment_rows,
        plan.config.context,
        settings.chosen_gradients,
        objective.name if objective else None,
    )
    current = {spec.key for record in sets.values() for spec in record.arrays}
    current -= replaced_arrays(sets)
    older = {key.split("@")[0]: key for key in current}
    replaces = [spec for spec in arrays if spec.objective is None and spec.key in older]
    return SetRecord(
        name=name,
        arrays=tuple(
            # Gradients of a further set stand beside those of any other, planned at once or not.
            replace(spec, variant=name)
            if spec in replaces or (spec.objective is not None and name != BASE_SET)
            else spec
            for spec in arrays
        ),
        retention={_label(spec): "raw" for spec in arrays},
        replaces=tuple(older[spec.key] for spec in replaces),
    )


def _label(spec: ArraySpec) -> str:
    is_forward = spec.pass_type is PassType.FORWARD
    return spec.location.label if is_forward else f"{spec.location}/{spec.pass_type}"


def require_same_objective(
    existing: StoreManifest, settings: IngestSettings, out: str | Path
) -> None:
    """Refuse to mix another objective into the base set, with the way to have both."""
    objective = settings.chosen_objective
    stored = existing.config["objective"]
    asked = objective.name if objective else None
    if settings.set_name == BASE_SET and stored != asked:
        way = (
            "add the gradients as a set of their own with --set"
            if asked
            else f"repeat --objective '{stored}'"
        )
        raise StoreConflict(
            f"{out} holds a store of another model or config: config.objective: the store has "
            f"{stored!r}, this run {asked!r}. Ingest into another path, or {way}.",
            kind=ErrorKind.CONFIG_CONFLICT,
        )
