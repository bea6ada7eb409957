package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

// UnreadableOwnerGrace is how long a stage or claim is left alone whose owner's
// file is there but cannot be understood: long enough for any restore to be over.
const UnreadableOwnerGrace = 10 * time.Minute

const (
	ownerSuffix   = ".owner"
	maxOwnerBytes = 4096
)

// Owner is the process that holds a stage or a claim.
type Owner struct {
	PID          int       `json:"pid"`
	StartTicks   uint64    `json:"startTicks"` // since boot, field 22 of /proc/PID/stat
	BootID       string    `json:"bootID"`
	PIDNamespace string    `json:"pidNamespace"` // as in "pid:[4026531836]"
	ContainerID  string    `json:"containerID,omitempty"`
	Time         time.Time `json:"time"`
}

// thisProcess describes the calling process.
func thisProcess() (Owner, error) {
	o := Owner{PID: os.Getpid()}
	stat, err := readStat(o.PID)
	if err != nil {
		return o, fmt.Errorf("owner: %w", err)
	}
	o.StartTicks = stat.startTicks
	if o.BootID, err = checkpoint.BootID(); err != nil {
		return o, fmt.Errorf("owner: %w", err)
	}
	if o.PIDNamespace, err = os.Readlink("/proc/self/ns/pid"); err != nil {
		return o, fmt.Errorf("owner: %w", err)
	}
	return o, nil
}

// alive reports whether the process other, as seen from o's, may still run.
func (o Owner) alive(other Owner) bool {
	switch {
	case other.BootID != o.BootID:
		return false
	case other.PIDNamespace != o.PIDNamespace:
		return true // its number means nothing here
	}
	stat, err := readStat(other.PID)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false
	}
	return err != nil || !stat.zombie && stat.startTicks == other.StartTicks
}

type procStat struct {
	zombie     bool
	startTicks uint64
}

func readStat(pid int) (procStat, error) {
	name := fmt.Sprintf("/proc/%d/stat", pid)
	data, err := os.ReadFile(name)
	if err != nil {
		return procStat{}, err
	}
	// The second field is the command in parentheses and may hold anything.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 {
		return procStat{}, fmt.Errorf("%s: %d fields", name, len(fields))
	}
	ticks, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("%s: %w", name, err)
	}
	state := fields[0][0]
	return procStat{zombie: state == 'Z' || state == 'X', startTicks: ticks}, nil
}

// writeOwner makes path say that this process, on behalf of the container,
// owns what lies beside it. A leftover of an earlier owner is replaced.
func (s *Store) writeOwner(path, containerID string) error {
	o := s.self
	o.ContainerID, o.Time = containerID, time.Now().UTC()
	data, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	if err := s.fs.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("owner: %w", err)
	}
	if err := fsys.WriteFile(s.fs, path, append(data, '\n')); err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	return nil
}

// owner reads the owner's file, and whether the owner may be alive. The owner
// is nil if there is no such file or it is damaged.
func (s *Store) owner(path string) (*Owner, bool, error) {
	data, err := fsys.ReadFile(s.fs, path, maxOwnerBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil && !errors.Is(err, fsys.ErrTooLarge) && !errors.Is(err, fsys.ErrNotRegular) {
		return nil, true, fmt.Errorf("owner: %w", err)
	}
	var o Owner
	if err == nil && json.Unmarshal(data, &o) == nil && o.PID > 0 && o.BootID != "" {
		return &o, s.self.alive(o), nil
	}
	st, err := s.fs.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, true, fmt.Errorf("owner: %w", err)
	}
	return nil, time.Since(st.ModTime()) < UnreadableOwnerGrace, nil
}
