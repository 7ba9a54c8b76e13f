//! End-to-end tests over the embedded fleet and over real processes.
