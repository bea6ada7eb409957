// Package event is the node's durable log of what stasis did and why: one JSON
// object per line, appended by shims and daemon alike, read by `stasis events`
// and turned into metrics by the daemon.
//
// Invariants: an event is one write(2) of one line to a file opened with
// O_APPEND, so lines of several writers never mix, and is synced; a reader skips
// lines that it cannot decode; the daemon rotates the file, and writers open it
// anew for each event, so no writer holds a rotated file for long.
package event

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

// FileName is the log's name within the store's root directory.
const FileName = "events.jsonl"

// Type says what happened.
type Type string

// The types of events.
const (
	Dumped      Type = "dumped"         // a checkpoint was committed
	DumpFailed  Type = "dump-failed"    // the container got its signal instead; Reason says why
	Restored    Type = "restored"       // a container goes on from a checkpoint
	ColdStart   Type = "cold-start"     // a checkpoint was there, but not used; Reason says why
	RestoreFail Type = "restore-failed" // strict: the start was made to fail; or, with code "pager", the container was killed after it; or see [Event.GivenUp]
	Quarantined Type = "quarantined"    // a checkpoint was set aside for study
	Ignored     Type = "ignored"        // annotations have no effect; Reason says which and why
	Removed     Type = "removed"        // a checkpoint was removed, by whom Reason says
	PromoteFail Type = "promote-failed" // a container did not become a template, and runs on
)

// Event is one line of the log. Empty fields do not apply.
type Event struct {
	Time         time.Time            `json:"time"`
	Type         Type                 `json:"type"`
	Identity     *checkpoint.Identity `json:"identity,omitempty"`
	PodName      string               `json:"podName,omitempty"`
	PodUID       string               `json:"podUID,omitempty"`
	SandboxID    string               `json:"sandboxID,omitempty"`
	ContainerID  string               `json:"containerID,omitempty"`
	CheckpointID checkpoint.ID        `json:"checkpointID,omitempty"`
	Reason       string               `json:"reason,omitempty"`
	// ReasonCode is one of a small set, fit for a metric's label: "missing",
	// "corrupt", "mismatch", "incompatible", "criu", "no-space", "busy",
	// "unsupported", "timeout", "aborted", "invalid", "crash-loop", "memory-limit",
	// "missed", "pager", "hook", "internal".
	ReasonCode     string              `json:"reasonCode,omitempty"`
	DurationMicros int64               `json:"durationMicros,omitempty"`
	SizeBytes      int64               `json:"sizeBytes,omitempty"`
	Timings        *checkpoint.Timings `json:"timings,omitempty"`
	// Phases are the parts of a restore, one after the other.
	Phases []Phase `json:"phases,omitempty"`
	// Volatile: Append does not wait for the disk, for nobody would miss the
	// event after a power cut.
	Volatile bool `json:"-"`
}

// GivenUp tells of a restore whose caller waited no longer: its container is gone,
// and the checkpoint waits for the next one.
func (e *Event) GivenUp() bool { return e.Type == RestoreFail && e.ReasonCode == "aborted" }

// Phase is a part of what the shim did for a restore: "claim" of the checkpoint,
// "prepare" (checks, images, host facts), "verify" of checksums, "layers", "create"
// of the inner object, "pager" (with the process that holds its descriptors),
// "runc" without "criu", which is what CRIU says that it took, "eager", all of a
// second try without a pager, and "hook", what the pod has run after it.
type Phase struct {
	Name   string `json:"name"`
	Micros int64  `json:"micros"`
}

const maxReason = 2048

// Append writes the event to the log under root, the store's root directory,
// setting Time where it is zero. Unless it is volatile it is durable once Append
// returns: a power cut must not leave a cold start that nobody explains.
func Append(root string, e Event) error {
	if e.Time.IsZero() {
		e.Time = time.Now().UTC()
	}
	if len(e.Reason) > maxReason {
		e.Reason = e.Reason[:maxReason] + "..."
	}
	line, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("event: %w", err)
	}
	path := filepath.Join(root, FileName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		f, err = os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	}
	if err != nil {
		return fmt.Errorf("event: %w", err)
	}
	line = append(line, '\n')
	if torn(f) {
		line = append([]byte{'\n'}, line...)
	}
	_, err = f.Write(line)
	if err == nil && !e.Volatile {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil && made {
		err = fsys.OS{}.SyncDir(root)
	}
	if err != nil {
		return fmt.Errorf("event: %w", err)
	}
	return nil
}

// torn tells whether the last line has no end, as a crash may leave it.
func torn(f *os.File) bool {
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return false
	}
	var last [1]byte
	_, err = f.ReadAt(last[:], st.Size()-1)
	return err == nil && last[0] != '\n'
}
