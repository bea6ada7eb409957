// Package checkpoint holds the vocabulary that every part of stasis shares:
// the annotations by which a pod opts in, the identity under which a container
// is found again, the fingerprint that says whether a record still fits it,
// and the manifest that describes a committed checkpoint.
//
// Invariants:
//
//   - An [ID] is opaque, made by [NewID] and checked by [ParseID] before it
//     becomes part of a path.
//   - A [Manifest] is the last file written to a checkpoint; a directory
//     without one was never committed.
//   - Everything read back (annotations, manifests) is untrusted until its
//     Validate method returned nil.
//
// Glossary: a checkpoint is the committed, restorable thing; a dump is one CRIU
// DUMP call; the image directory holds CRIU's .img files; the writable layer is
// the upper directory of the container's overlay; a claim is the exclusive
// right to restore a checkpoint once.
package checkpoint
