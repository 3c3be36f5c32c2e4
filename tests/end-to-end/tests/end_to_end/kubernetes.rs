//! The manifests in `deploy/kubernetes`, compared with the code. `scripts/kubernetes-manifests`
//! builds them and checks them against schemas. No test applies them to a cluster.
//!
//! Decision: docs/decisions/0081-how-are-the-kubernetes-manifests-tested.md

mod combinations;
mod manifests;
mod network;
mod operators;
mod pods;
mod references;
