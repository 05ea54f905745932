"""The demo corpus: generated faces in four sets, with leaks of known kind planted in the release.

    python -m seeds.demo make OUT [--scale S]    make all sets, and the key beside them
    python -m seeds.demo score RUN CORPUS        after an audit: which planted leaks were found

No real person is in it: every face comes from the generator of `generator`, a person being a latent vector. So it is
known which release images were copied from which training image and how strongly, and an audit can be graded. The
audit never reads the key, and nothing of the product imports this package.

Terms: the generator's weights are under the MIT licence; they were trained on DigiFace-1M, renders of consented scans,
whose terms are non-commercial research. Use the corpus accordingly.
"""
