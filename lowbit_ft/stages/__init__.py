"""The stages of a run, one file each; pipeline.py calls them in the order of the line.

    synthesis  synthesis/  rows that the model writes itself, where the recipe has data.synthesis
    quantize   base/       pack the checkpoint, or reuse what is packed
    train      adapter/    attach, fit to the dense layers, make a teacher, train, write what was trained
    merge      merged/     the integers that ship
    export     exported/   the same integers in a server's format, read back and compared
    evaluate   the table of perplexity and KL;   tasks   lm-eval
    reconstruct  reconstruct/: the fit;   teacher, answers  teacher.json, teacher/: what is learned from
    data, models, card     what several of them need: batches, the model of a stage read back, the model card

Why these are not in the folders of their sections: a stage is where sections meet. Each needs the recipe,
the run folder, the checkpoint, the tokenizer, the device and the console, which is a Session, and most need a
second section beside their own (train/ would have to know merge, export and the adapter files; evaluate/ the
data). With plain arguments every stage would take eight of them and hand most of them on. So the sections
stay on their floors, know no run, and are called from here.
"""
