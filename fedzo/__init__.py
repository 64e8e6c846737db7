"""Federated zeroth-order fine-tuning: clients and server exchange seeds and scalars.

A *method* (:mod:`fedzo.methods`) says what a client computes, what is sent and how the server
merges; :class:`fedzo.simulation.Federation` runs it over simulated clients on one copy of a model.

::

    federation = Federation(model, task, Meerkat(steps=10), shards, seed=0, batch_size=16)
    for record in federation.run(rounds=100):
        print(record.round, record.loss, record.bytes_up)
"""
