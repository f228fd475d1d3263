"""The main job: pre-process, timed inference, post-process, baseline, certificate, output folder, resume.

`isologit.job.run.run_job(RunOptions(...))` is the way in. Nothing is imported here, so that the command line can read
the options without loading an engine.
"""
