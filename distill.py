"""The main job: python distill.py config=configs/... key=value ...; see --help."""

from dmd_dar.distillation.job import main

if __name__ == "__main__":
    main()
