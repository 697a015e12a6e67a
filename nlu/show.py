"""A reply for programs (one JSON object) and for people (a terminal page)."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nlu.v1 import nlu_pb2 as pb

_SPAN_STYLES = ("bold cyan", "bold magenta", "bold green", "bold yellow", "bold blue", "bold red")
_MILLION = 1e6


def reply_json(reply: pb.UnderstandReply) -> dict[str, Any]:
    """The object `nlu say --json` prints."""
    timings = reply.timings_ns
    return {
        "phrase": reply.phrase,
        "annotations": [_annotation_json(annotation) for annotation in reply.annotations],
        "replies": [_candidate_json(candidate) for candidate in reply.replies],
        **({"route": _route_json(reply.route)} if reply.HasField("route") else {}),
        "versions": {
            "bundle": reply.versions.bundle,
            "vectorizer": reply.versions.vectorizer,
            "service": reply.versions.service,
        },
        "timings_ns": {field.name: getattr(timings, field.name) for field in timings.DESCRIPTOR.fields},
        "source": pb.Source.Name(reply.source).removeprefix("SOURCE_").lower(),
        "hypothesis": reply.hypothesis,
    }


def _annotation_json(annotation: pb.Annotation) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": annotation.name,
        "status": _status(annotation),
        "labels": [_label_json(label) for label in annotation.labels],
        "spans": [
            {"label": s.label, "text": s.text, "start": s.start, "end": s.end, "score": _short(s.score)}
            for s in annotation.spans
        ],
        "disagreement": _short(annotation.disagreement),
    }
    if annotation.HasField("out_of_scope"):
        shown["out_of_scope"] = _short(annotation.out_of_scope)
    if annotation.restored:
        shown["restored"] = annotation.restored
    return shown | ({"note": annotation.note} if annotation.note else {})


def _label_json(label: pb.Label) -> dict[str, Any]:
    shown: dict[str, Any] = {"label": label.label, "score": _short(label.score), "accepted": label.accepted}
    if label.HasField("raw_score"):
        shown["raw_score"] = _short(label.raw_score)
    if label.HasField("threshold"):
        shown["threshold"] = _short(label.threshold)
    return shown


def _candidate_json(candidate: pb.Candidate) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": candidate.id,
        "text": candidate.text,
        "score": _short(candidate.score),
        "similarity": _short(candidate.similarity),
    }
    if candidate.features:
        features = {name: _short(value) for name, value in sorted(candidate.features.items())}
        shown |= {"prompt": candidate.prompt, "features": features}
    return shown


def _route_json(route: pb.Route) -> dict[str, Any]:
    return {"to": route.to, "name": route.name, **({"because": list(route.because)} if route.because else {})}


def reply_page(reply: pb.UnderstandReply, text: str) -> RenderableType:
    """Annotations and replies as tables, spans marked in the text they were found in."""
    heads = Table(box=None, pad_edge=False, show_header=False)
    for annotation in reply.annotations:
        heads.add_row(Text(annotation.name, style="dim"), _answer(annotation, text))
    replies = Table(box=None, pad_edge=False, show_header=False)
    for candidate in reply.replies:
        replies.add_row(f"{candidate.score:.2f}", candidate.text, Text(candidate.id, style="dim"))
    route: list[RenderableType] = []
    if reply.HasField("route"):
        because = [Text(f"  {line}", style="dim") for line in reply.route.because]
        route = [Text(), Text(f"route {reply.route.to}: {reply.route.name}", style="bold"), *because]
    timings = reply.timings_ns
    footer = (
        f"{timings.total / _MILLION:.2f} ms: encode {timings.encode / _MILLION:.2f} "
        f"({pb.Source.Name(reply.source).removeprefix('SOURCE_').lower()}), annotate {timings.annotate / _MILLION:.2f}, "
        f"search {timings.search / _MILLION:.2f}, rank {timings.rank / _MILLION:.2f}"
        f"   bundle {reply.versions.bundle[:12]}, vectorizer {reply.versions.vectorizer[:12]}"
    )
    return Group(
        Text(reply.phrase, style="bold"),
        Text(),
        heads,
        Text(),
        replies,
        *route,
        Text(),
        Text(footer, style="dim"),
    )


def description_json(description: pb.DescribeReply) -> dict[str, Any]:
    """The object `nlu describe --json` prints."""
    return {
        "versions": {
            "bundle": description.versions.bundle,
            "vectorizer": description.versions.vectorizer,
            "service": description.versions.service,
        },
        "channel": description.channel,
        "seq": description.seq,
        "dim": description.dim,
        "token_dim": description.token_dim,
        "heads": [
            {"name": h.name, "kind": h.kind, "task": h.task, "labels": list(h.labels), "version": h.version}
            for h in description.heads
        ],
        "components": [
            {"name": c.name, "kind": c.kind, "digest": c.digest, "state": c.state}
            for c in description.components
        ],
        "reply_rows": description.replies,
        "personas": list(description.personas),
        "surfaces": list(description.surfaces),
        "limits": {
            field.name: getattr(description.limits, field.name)
            for field in description.limits.DESCRIPTOR.fields
        },
        **({"release": release_json(description.release)} if description.HasField("release") else {}),
    }


def release_json(release: pb.Release) -> dict[str, Any]:
    """A release as an object; times are RFC 3339, and absent where there are none."""
    times = {
        name: getattr(release, name).ToJsonString() for name in ("since", "expires") if release.HasField(name)
    }
    return {
        "state": release.state,
        "bundle": release.bundle,
        "channel": release.channel,
        "seq": release.seq,
        **times,
        "pinned": release.pinned,
        "wanted": release.wanted,
        "reason": release.reason,
    }


def release_lines(release: pb.Release) -> list[Text]:
    """What a server does, what holds it, and what it refused last."""
    since = f" since {release.since.ToJsonString()}" if release.HasField("since") else ""
    expires = f", expires {release.expires.ToJsonString()}" if release.HasField("expires") else ""
    lines = [Text(f"release     {release.state}{since}{expires}")]
    if release.pinned:
        lines.append(Text(f"pinned      {release.pinned}", style="yellow"))
    if release.reason:
        lines.append(Text(f"refused     {release.wanted or 'what the channel points to'}", style="bold red"))
        lines.append(Text(f"            {release.reason}", style="red"))
    return lines


def description_page(description: pb.DescribeReply) -> RenderableType:
    """What is served, on one page."""
    heads = Table("head", "kind", "task", "labels", "version", box=None, pad_edge=False, header_style="dim")
    for head in description.heads:
        labels = ", ".join(head.labels[:6]) + (f", ... ({len(head.labels)})" if len(head.labels) > 6 else "")
        heads.add_row(head.name, head.kind, head.task, labels, head.version[:12])
    versions = description.versions
    release = release_lines(description.release) if description.HasField("release") else []
    if description.HasField("release") and not versions.bundle:
        return Group(*release)
    shadows = [f"{part.name} {part.digest[:12]}" for part in description.components if part.kind == "shadow"]
    return Group(
        Text(f"bundle      {versions.bundle}  (channel {description.channel}, seq {description.seq})"),
        Text(
            f"vectorizer  {versions.vectorizer}  ({description.dim} dimensions, tokens {description.token_dim})"
        ),
        Text(f"service     {versions.service}"),
        Text(
            f"replies     {description.replies} rows; personas {', '.join(description.personas)}; "
            f"surfaces {', '.join(description.surfaces)}"
        ),
        *([Text(f"shadows     {', '.join(shadows)}")] if shadows else []),
        *release,
        Text(),
        heads,
    )


def _answer(annotation: pb.Annotation, text: str) -> Text:
    if annotation.status not in (pb.STATUS_OK, pb.STATUS_DEGRADED):
        return Text(f"{_status(annotation)}: {annotation.note}", style="dim italic")
    line = Text()
    for rank, label in enumerate(annotation.labels[:3]):
        style = "bold green" if label.accepted else "dim"
        line.append("   " if rank else "").append(f"{label.label} {label.score:.2f}", style=style)
    if annotation.spans:
        line.append("   " if annotation.labels else "").append(_marked(annotation, text))
    if annotation.restored:
        return Text(annotation.restored)
    if annotation.HasField("out_of_scope") and annotation.out_of_scope >= 0.5:
        line.append(f"   out of scope {annotation.out_of_scope:.2f}", style="yellow")
    if annotation.disagreement > 0.005:
        line.append(f"   hypotheses disagree {annotation.disagreement:.2f}", style="yellow")
    return line if line.plain else Text("nothing", style="dim")


def _marked(annotation: pb.Annotation, text: str) -> Text:
    marked, position = Text(), 0
    colours = {
        label: _SPAN_STYLES[i % len(_SPAN_STYLES)]
        for i, label in enumerate(dict.fromkeys(s.label for s in annotation.spans))
    }
    for span in annotation.spans:
        if span.start < position:
            continue
        marked.append(text[position : span.start])
        marked.append(f"[{span.text}]", style=colours[span.label]).append(span.label, style="dim")
        position = span.end
    return marked.append(text[position:])


def _status(annotation: pb.Annotation) -> str:
    return pb.Status.Name(annotation.status).removeprefix("STATUS_").lower()


def _short(number: float) -> float:
    return round(float(number), 4)
