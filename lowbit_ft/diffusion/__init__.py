"""Diffusion transformers of diffusers as models of the house: opened, called, sampled from.

    names.py        the name in config.json, the auto class of transformers
    traits.py       the classes that are read: what each sees of a picture, and what it is told beside
    texts.py        what it is told of a prompt: states of a text encoder, in a file
    config.py       config.json of diffusers as a configuration of transformers
    transformer.py  the model: diffusers' own class, whose parts stand where transformers looks for them
    register.py     tells transformers of both, only when somebody opens one
    paths.py        from a picture to noise: velocity and noise, and the way back in n steps

diffusers is an extra; nothing here imports it before a model is built.
"""
