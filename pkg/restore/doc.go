// Package restore turns a claimed checkpoint into a plan for restoring a
// container from it, or says why it must not be used.
//
// Invariants:
//
//   - It reports and never decides: whether a refused container starts cold or
//     not at all is up to the caller, and so is what becomes of the checkpoint.
//   - It changes nothing in the checkpoint's directory, so a plan that is not
//     carried out leaves the checkpoint as good as it was.
//   - Cheap checks come before those that read the whole checkpoint.
package restore
