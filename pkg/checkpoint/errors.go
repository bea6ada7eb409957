package checkpoint

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Sentinels of this module. Each wraps a class of errdefs, which survives a
// socket; the sentinel itself does not.
var (
	// ErrInvalid: a value that a user, an image or a file gave is not acceptable.
	ErrInvalid = fmt.Errorf("invalid value: %w", errdefs.ErrInvalidArgument)
	// ErrNotFound: there is no such committed checkpoint.
	ErrNotFound = fmt.Errorf("no such checkpoint: %w", errdefs.ErrNotFound)
	// ErrCorrupt: a checkpoint is there, but not as it was written.
	ErrCorrupt = fmt.Errorf("corrupt checkpoint: %w", errdefs.ErrDataLoss)
	// ErrIncompatible: a checkpoint is whole, but does not fit this container,
	// CPU, kernel or CRIU; the text names the field.
	ErrIncompatible = fmt.Errorf("incompatible checkpoint: %w", errdefs.ErrFailedPrecondition)
	// ErrUnsupported: the container holds something that cannot be dumped.
	ErrUnsupported = fmt.Errorf("cannot be checkpointed: %w", errdefs.ErrNotImplemented)
	// ErrBusy: another operation holds the checkpoint or the node's dump slots.
	ErrBusy = fmt.Errorf("checkpoint is busy: %w", errdefs.ErrUnavailable)
	// ErrNoSpace: the store's file system has too little room for a dump.
	ErrNoSpace = fmt.Errorf("not enough free space: %w", errdefs.ErrResourceExhausted)
)
