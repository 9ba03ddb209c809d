"""Diffusion transformers of diffusers as models of the house: opened, called, sampled from.

    names.py        the classes that are read, the name in config.json, the auto class of transformers
    config.py       config.json of diffusers as a configuration of transformers
    transformer.py  the model: diffusers' own class, whose parts stand where transformers looks for them
    register.py     tells transformers of both, only when somebody opens one
    paths.py        from a picture to noise: velocity and noise, and the way back in n steps

diffusers is an extra; nothing here imports it before a model is built.
"""
