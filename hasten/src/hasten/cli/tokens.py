"""`hasten tokens fit|inspect|map|convert|train|refine|sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.progress import Progress
from rich.table import Table

from hasten.cli.common import BAR, console
from hasten.cli.options import MOST_COUNT, as_options, load_decoder, number, numbers
from hasten.cli.token_options import (
    MOST_CODES,
    MOST_MINUTES,
    MOST_TEMPERATURE,
    MOST_TOKENS,
    MOST_WIDTH,
    Batch,
    Codebook,
    Heads,
    Layers,
    MapFile,
    Out,
    Rate,
    Seed,
    TreeFile,
    Updates,
    trained,
)
from hasten.errors import ConfigError, ModelError
from hasten.io import check_target, describe, write_atomically
from hasten.parameters import MOST_GUIDANCE, Range

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Smaller vocabularies for autoregressive image models (MASC).")


@app.command()
def fit(
    codebook: Codebook,
    out: Out = Path("tree.safetensors"),
    tensor: Annotated[str | None, typer.Option(help="Name of the matrix in a safetensors file.")] = None,
    normalize: Annotated[
        str, typer.Option(help="unit for tokenizers that look codes up by direction, none for those by distance.")
    ] = "unit",
    tokens: Annotated[
        Path | None, typer.Option(help="Shards of tokens: codes that never occur are left out of the tree.")
    ] = None,
    density: Annotated[bool, typer.Option(help="Let each code count as often as it occurs in --tokens.")] = False,
    exact: Annotated[bool | None, typer.Option(help="Exact by default up to 32,768 codes.")] = None,
) -> None:
    """Fit the semantic tree of a codebook.

    Example: hasten tokens fit vq_ds16_c2i.pt --tokens fine --out tree.safetensors
    """
    from hasten.tokens.codebook import codebook_fingerprint
    from hasten.tokens.reading import read_codebook
    from hasten.tokens.shards import TokenShards
    from hasten.tokens.tree import SemanticTree

    codes = read_codebook(codebook, tensor)
    shards = None if tokens is None else TokenShards.open(tokens)
    if shards is not None and shards.codebook and shards.codebook != codebook_fingerprint(codes):
        raise ModelError(f"{tokens} holds tokens of another codebook than {codebook}; use the tokenizer's own")
    used = None if shards is None else shards.token_counts()
    if density and used is None:
        raise ConfigError("--density counts how often each code occurs: give --tokens")
    check_target(out, codebook, tokens)
    if codes.ndim == 2:
        console.print(
            str(SemanticTree.cost(len(codes) if used is None else int((used > 0).sum()), codes.shape[1], exact))
        )
    with Progress(*BAR, console=console) as bar:
        task = bar.add_task("distances", total=None)
        tree = SemanticTree.fit(
            codes,
            normalize=normalize,  # type: ignore[arg-type]
            used=used,
            weights=used if density else None,
            exact=exact,
            progress=lambda done, total: bar.update(task, completed=done, total=total, description="merging"),
        )
    tree.save(out)
    kind = "exact" if tree.exact else "approximate"
    console.print(f"{len(codes)} codes, {tree.leaves} used, {kind} tree: [bold]{out}[/bold]")


@app.command()
def inspect(
    tree: TreeFile,
    k: Annotated[str, typer.Option(help="Numbers of clusters, with commas.")] = "",
    plots: Annotated[Path | None, typer.Option(help="Folder for images of the tree and the sizes.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="module:function that draws tokens; adds swatches of each cut to --plots.")
    ] = None,
) -> None:
    """Show cuts of a tree: sizes of clusters and the distance at which the cut lies.

    Example: hasten tokens inspect tree.safetensors --k 512 --plots plots --decoder hasten_zoo.emoji_tokens:swatches
    """
    from hasten.bench.token_plots import plot_sizes, plot_swatches, plot_tree
    from hasten.tokens.tree import SemanticTree

    if decoder is not None and plots is None:
        raise ConfigError("--decoder draws swatches into the folder of --plots; give both")
    decode = None if decoder is None else load_decoder(decoder)
    given = numbers(k, "--k", Range(1, MOST_CODES)) if k else []
    for picture in () if plots is None else (plots / "sizes.png", plots / "tree.png"):
        check_target(picture, tree)
    tree_ = SemanticTree.load(tree)
    ks = given or [max(1, tree_.leaves // 2**i) for i in range(1, 5)]
    table = Table("k", "largest", "median", "of one code", "height", title=f"{tree.name}: {tree_.leaves} used codes")
    maps = {f"cut {i}": tree_.map(value) for i, value in enumerate(ks)}
    for value, mapping in zip(ks, maps.values(), strict=True):
        merged = tree_.leaves - value
        height = f"{tree_.heights[merged - 1]:.4g}" if merged else "0"
        sizes = mapping.sizes
        table.add_row(str(value), str(sizes.max()), f"{np.median(sizes):g}", str((sizes == 1).sum()), height)
    console.print(table)
    if plots is not None:
        console.print(f"sizes: [bold]{plot_sizes(maps, plots / 'sizes.png')}[/bold]")
        if tree_.exact:
            console.print(f"tree:  [bold]{plot_tree(tree_, plots / 'tree.png')}[/bold]")
        if decode is not None:
            files = [plot_swatches(m, decode, plots / f"swatches-{m.clusters}.png") for m in maps.values()]
            console.print(f"members of the largest clusters: [bold]{', '.join(map(str, files))}[/bold]")


@app.command("map")
def map_(
    tree: TreeFile,
    k: Annotated[int, number(Range(1, MOST_CODES), "Clusters.")],
    out: Out = Path("map.safetensors"),
    max_size: Annotated[int | None, number(Range(1, MOST_CODES), "Most used codes of a cluster.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="Shards of tokens that are to be mapped.")] = None,
    mapped: Annotated[Path | None, typer.Option(help="Folder for the mapped shards.")] = None,
) -> None:
    """Cut a tree into a map, and map token shards with it.

    Example: hasten tokens map tree.safetensors --k 4096 --max-size 32 --tokens fine --mapped coarse
    """
    from hasten.tokens.shards import TokenShards
    from hasten.tokens.tree import SemanticTree

    if (tokens is None) != (mapped is None):
        raise ConfigError("--tokens and --mapped belong together: the shards to read, and the folder to write")
    for target in (out, *([] if mapped is None else [mapped / "index.json"])):
        check_target(target, tree, tokens)
    with as_options({"k must be": "--k must be", "raise max_size or k": "raise --max-size or --k"}):
        mapping = SemanticTree.load(tree).map(k, max_size)
    shards = None if tokens is None else TokenShards.open(tokens)
    if shards is not None:
        shards.check(mapping)
    mapping.save(out)
    console.print(f"{mapping.tokens} tokens to {mapping.clusters} clusters: [bold]{out}[/bold]")
    if shards is not None and mapped is not None:
        with Progress(*BAR, console=console) as bar:
            task = bar.add_task("mapping", total=None)
            shards.mapped(mapping, mapped, lambda done, total: bar.update(task, completed=done, total=total))
        console.print(f"{len(shards)} images of {shards.length} clusters: [bold]{mapped}[/bold]")


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model, as save_pretrained writes it.")],
    mapping: MapFile,
    out: Out = Path("converted"),
    rows: Annotated[
        int | None, number(Range(0, MOST_CODES), "Row of the first image token, where the model does not say it.")
    ] = None,
    start: Annotated[str, typer.Option(help="New rows: normal, or the mean of their members' old ones.")] = "normal",
    seed: Seed = 0,
) -> None:
    """Give a model's image tokens rows of clusters; text rows stay. Train the result with hasten.fitting.token_model.

    Example: hasten tokens convert emu3 --map map.safetensors --start mean --out emu3-clusters
    """
    import transformers

    from hasten.io import read_json
    from hasten.tokens.export import FACTS, MAP, export_model
    from hasten.tokens.mapping import TokenMap
    from hasten.tokens.replace import replace_vocabulary

    if (model / FACTS).exists():
        raise ModelError(f"{model} is a model of clusters already; give the folder of the model that it was made of")
    mapping_ = TokenMap.load(mapping)
    names = read_json(model / "config.json").get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise ModelError(f"{model} is a {names[0] or 'model without a name'}, which transformers does not have")
    for name in ("config.json", MAP, FACTS):
        check_target(out / name, model, mapping)
    try:
        with console.status("reading"):
            lm = kind.from_pretrained(model, local_files_only=True, use_safetensors=True, dtype="auto")
    except Exception as error:  # whatever the other library raises, this is no usable model
        raise ModelError(f"{model}: no usable model ({describe(error)}); give a folder of save_pretrained") from error
    with as_options({"rows=": "--rows "}):
        done = replace_vocabulary(lm, mapping_, rows=rows, start=start, seed=seed)  # type: ignore[arg-type]
    export_model(lm, mapping_, out, done.vocabulary)
    cleared = f", cleared: {', '.join(done.cleared)}" if done.cleared else ""
    console.print(
        f"{done.rows_before} to {done.rows_after} rows ({done.kept} of text kept), "
        f"{done.parameters_saved:,} parameters fewer{cleared}: [bold]{out}[/bold]"
    )


@app.command()
def train(
    tokens: Annotated[Path, typer.Argument(help="Shards of fine tokens.")],
    mapping: MapFile,
    out: Out = Path("runs/tokens"),
    held_out: Annotated[Path | None, typer.Option(help="Shards to measure on.")] = None,
    steps: Updates = 2000,
    minutes: Annotated[
        float | None, number(Range(0, MOST_MINUTES), "Stop after as many; the same command goes on.")
    ] = None,
    batch: Batch = 64,
    accumulate: Annotated[int, number(Range(1, MOST_COUNT), "Parts of a process's batch, one after the other.")] = 1,
    width: Annotated[int, number(Range(1, MOST_WIDTH), "Width of the model; twice the heads divide it.")] = 256,
    layers: Layers = 6,
    heads: Heads = 4,
    lr: Rate = 1e-3,
    seed: Seed = 0,
) -> None:
    """Train a class-conditional model on clusters; resumable, and under `accelerate launch` data parallel.

    Example: hasten tokens train fine --map map.safetensors --held-out val --steps 5000 --out runs/masc
    """
    from hasten.fitting.token_model import CHECKPOINT, Trainer
    from hasten.fitting.token_recipe import Recipe
    from hasten.tokens.export import MAP, export_model
    from hasten.tokens.mapping import TokenMap
    from hasten.tokens.shards import TokenShards

    sizes = {"width": width, "layers": layers, "heads": heads}
    for target in (out / CHECKPOINT, out / "log.jsonl", *([out / "model" / MAP] if (out / "model").is_dir() else [])):
        check_target(target, tokens, held_out, mapping)
    recipe = Recipe(steps=steps, batch=batch, accumulate=accumulate, lr=lr, seed=seed, **sizes)
    trainer = Trainer(TokenShards.open(tokens), TokenMap.load(mapping), recipe)
    other = None if held_out is None else TokenShards.open(held_out)
    main = trainer.accelerator.is_main_process
    with Progress(*BAR, console=console, disable=not main) as bar:
        task = bar.add_task("training", total=steps)
        done = trainer.run(
            out,
            other,
            minutes,
            progress=lambda now, total, loss: bar.update(task, completed=now, description=f"loss {loss:.3f}"),
        )
    if not main:
        return
    if done:
        built: Any = trainer.causal
        export_model(built.model, trainer.mapping, out / "model", built.vocabulary)
        console.print(f"model: [bold]{out / 'model'}[/bold]")
    else:
        console.print(f"stopped at step {trainer.steps} of {steps}; the same command goes on")


@app.command()
def refine(
    tokens: Annotated[Path, typer.Argument(help="Shards of fine tokens.")],
    model: Annotated[Path, typer.Option("--model", help="The folder `model` that `hasten tokens train` wrote.")],
    out: Out = Path("refiner.safetensors"),
    steps: Updates = 1000,
    batch: Batch = 64,
    width: Annotated[int, number(Range(1, MOST_WIDTH), "Width of the refiner; 512 in the paper.")] = 512,
    heads: Heads = 4,
    layers: Layers = 1,
    lr: Rate = 2e-4,
    seed: Seed = 0,
) -> None:
    """Train a refiner, which chooses the member of a cluster by the model's hidden state; the model is only run.

    Example: hasten tokens refine fine --model runs/masc/model --out runs/masc/refiner.safetensors
    """
    import torch

    from hasten.fitting.refiner import train_refiner
    from hasten.tokens.refiner import Refiner, RefinerConfig
    from hasten.tokens.shards import TokenShards

    check_target(out, tokens, model)
    lm, opened, conditions = trained(model)
    shards = TokenShards.open(tokens)
    shards.check(opened.mapping)
    torch.manual_seed(seed)
    config = RefinerConfig(hidden=opened.model.config.hidden_size, width=width, heads=heads, layers=layers)
    refiner = Refiner(opened.mapping, config)
    with Progress(*BAR, console=console) as bar:
        task = bar.add_task("training", total=steps)
        losses = train_refiner(
            lm,
            refiner,
            shards,
            conditions,
            steps=steps,
            batch=batch,
            lr=lr,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    last = losses[-max(1, steps // 10) :]
    console.print(f"loss {np.mean(last):.3f} nats per token: [bold]{refiner.save(out)}[/bold]")


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="The folder `model` that `hasten tokens train` wrote.")],
    classes: Annotated[str, typer.Option(help="One class an image, with commas.")],
    length: Annotated[int, number(Range(1, MOST_TOKENS), "Tokens of an image.")],
    out: Out = Path("samples.npy"),
    members: Annotated[str, typer.Option(help="uniform, frequency, medoid or centroid.")] = "uniform",
    refiner: Annotated[
        Path | None, typer.Option(help="A refiner that `hasten tokens refine` wrote; it takes the place of --members.")
    ] = None,
    codebook: Annotated[
        Path | None, typer.Option(help="That the map was made of; for medoid and centroid.", dir_okay=False)
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of the matrix in the codebook's file.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="Shards of fine tokens, for frequency.")] = None,
    temperature: Annotated[float, number(Range(above=0, most=MOST_TEMPERATURE), "Divides the logits.")] = 1.0,
    top_k: Annotated[int, number(Range(0, MOST_CODES), "In fine tokens; scaled to the clusters. 0 for no limit.")] = 0,
    top_p: Annotated[float, number(Range(above=0, most=1), "Of the likeliest clusters together.")] = 1.0,
    guidance: Annotated[float, number(Range(0, MOST_GUIDANCE), "Classifier-free guidance; 1 is off.")] = 1.0,
    decoder: Annotated[
        str | None, typer.Option(help="module:function that draws images of tokens; writes a .png beside --out.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Draw fine tokens, [images, length] as .npy, for a tokenizer to decode.

    Example: hasten tokens sample runs/masc/model --classes 0,0,3 --length 64 --decoder hasten_zoo.emoji_tokens:decode
    """
    import torch

    from hasten.bench.token_plots import plot_images
    from hasten.tokens.members import MemberSampler
    from hasten.tokens.reading import read_codebook
    from hasten.tokens.refiner import Refiner
    from hasten.tokens.sample import Sampling, sample_clusters, scaled_top_k
    from hasten.tokens.shards import TokenShards

    decode = None if decoder is None else load_decoder(decoder)
    wanted = torch.tensor(numbers(classes, "--classes", Range(0, MOST_CODES)))
    picture = out.with_suffix(".png")
    if decode is not None and picture == out:
        raise ConfigError(f"--out {out}: the picture of --decoder goes there; give another ending, such as .npy")
    for target in (out, picture) if decode is not None else (out,):
        check_target(target, model, codebook, refiner, tokens)
    lm, opened, conditions = trained(model)
    mapping, most = opened.mapping, opened.model.config.max_position_embeddings - 1
    if length > most:
        raise ConfigError(f"--length {length}: the model was trained on images of at most {most} tokens")
    limit = scaled_top_k(top_k, mapping.tokens, mapping.clusters)
    sampling = Sampling(temperature=temperature, top_k=limit, top_p=top_p, guidance=guidance)
    shards = None if tokens is None else TokenShards.open(tokens)
    if shards is not None:
        shards.check(mapping)
    counts = None if shards is None else shards.token_counts()
    codes = None if codebook is None else read_codebook(codebook, tensor)
    with as_options({"give codebook=": "give --codebook", "give counts=": "give --tokens"}):
        sampler = MemberSampler.make(mapping, members, codebook=codes, counts=counts)  # type: ignore[arg-type]
    chooser = None
    if refiner is not None:
        chooser = Refiner.load(refiner)
        chooser.check(mapping)
    known = opened.vocabulary.before - mapping.tokens - 1
    if int(wanted.max()) >= known:
        raise ConfigError(f"--classes: the model knows the classes 0 .. {known - 1}, got {int(wanted.max())}")
    with console.status("drawing"):
        clusters, states = sample_clusters(lm, conditions.of(wanted), length, sampling, seed, conditions.none())
        if chooser is None or states is None:
            drawn = sampler(clusters.numpy(), seed)
        else:
            drawn = chooser.sample(states, clusters, torch.Generator().manual_seed(seed)).numpy()
    write_atomically(out, lambda file: np.save(file, drawn))
    console.print(f"{len(wanted)} images of {length} tokens: [bold]{out}[/bold]")
    if decode is not None:
        rows = {f"class {c}": decode(drawn[wanted.numpy() == c]) for c in wanted.unique().tolist()}
        console.print(f"images: [bold]{plot_images(rows, picture)}[/bold]")
