package reboot

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
)

const (
	// FileName is the node manifest's name within the store's root directory.
	FileName = "reboot.json"
	tempName = ".reboot.json.new"
	lockName = ".reboot.lock"

	// FormatVersion is the version of [Manifest]. Readers refuse others.
	FormatVersion = 1

	maxManifestBytes = 8 << 20
	maxContainers    = 4096
	maxReason        = 1024 // bytes
)

// Manifest says what a preparation of the node came to.
type Manifest struct {
	FormatVersion int    `json:"formatVersion"`
	BootID        string `json:"bootID"` // of the kernel that the containers were dumped under
	KernelRelease string `json:"kernelRelease"`
	// PreparedAt is when the preparation was over.
	PreparedAt time.Time `json:"preparedAt"`
	// StoppedKubelet is the unit that was stopped for the preparation, for
	// whoever aborts it; empty if none was.
	StoppedKubelet string  `json:"stoppedKubelet,omitempty"`
	Containers     []Entry `json:"containers"`
}

// Outcome is what became of one container.
type Outcome string

const (
	Dumped Outcome = "dumped" // it is frozen, and has a committed checkpoint
	Failed Outcome = "failed" // it runs on, or nobody knows; Reason says why
)

// Entry is one container that had opted in.
type Entry struct {
	// Identity may be empty of a container that failed.
	Identity    checkpoint.Identity `json:"identity"`
	PodName     string              `json:"podName,omitempty"`
	PodUID      string              `json:"podUID,omitempty"`
	ContainerID string              `json:"containerID"`
	Result      Outcome             `json:"result"`
	Reason      string              `json:"reason,omitempty"`
	// Of one that was dumped; Duration is in nanoseconds.
	CheckpointID checkpoint.ID `json:"checkpointID,omitempty"`
	SizeBytes    int64         `json:"sizeBytes,omitempty"`
	Duration     time.Duration `json:"duration,omitempty"`
}

// Name is what people call the container: its identity, or else its ID.
func (e *Entry) Name() string {
	if e.Identity == (checkpoint.Identity{}) {
		return e.ContainerID
	}
	return e.Identity.String()
}

// Complete reports whether every container was dumped.
func (m *Manifest) Complete() bool {
	for _, e := range m.Containers {
		if e.Result != Dumped {
			return false
		}
	}
	return true
}

// Validate checks version, identifiers and bounds. Errors wrap
// [checkpoint.ErrCorrupt].
func (m *Manifest) Validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("node manifest: "+format+": %w", append(a, checkpoint.ErrCorrupt)...)
	}
	switch {
	case m.FormatVersion != FormatVersion:
		return bad("format version %d, this stasis reads %d", m.FormatVersion, FormatVersion)
	case !plain(m.BootID, 64) || m.BootID == "":
		return bad("boot id %.64q", m.BootID)
	case !plain(m.KernelRelease, 128):
		return bad("kernel release %.64q", m.KernelRelease)
	case !plain(m.StoppedKubelet, 256):
		return bad("unit %.64q", m.StoppedKubelet)
	case len(m.Containers) > maxContainers:
		return bad("%d containers, at most %d are allowed", len(m.Containers), maxContainers)
	}
	seen := make(map[string]bool, len(m.Containers))
	for i := range m.Containers {
		e := &m.Containers[i]
		if !containerID(e.ContainerID) {
			return bad("container id %.64q", e.ContainerID)
		}
		if seen[e.ContainerID] {
			return bad("container %s twice", e.ContainerID)
		}
		seen[e.ContainerID] = true
		if e.Identity != (checkpoint.Identity{}) || e.Result == Dumped {
			if err := e.Identity.Validate(); err != nil {
				return bad("container %s: %v", e.ContainerID, err)
			}
		}
		switch e.Result {
		case Dumped:
			if _, err := checkpoint.ParseID(string(e.CheckpointID)); err != nil {
				return bad("container %s: %v", e.ContainerID, err)
			}
			if e.CheckpointID.IdentityHash() != e.Identity.Hash() {
				return bad("container %s: checkpoint %s is of another identity", e.ContainerID, e.CheckpointID)
			}
		case Failed:
			if e.CheckpointID != "" {
				return bad("container %s failed, but has a checkpoint", e.ContainerID)
			}
		default:
			return bad("container %s: result %.64q", e.ContainerID, e.Result)
		}
		if e.SizeBytes < 0 || e.Duration < 0 || len(e.PodName) > 253 || len(e.PodUID) > 253 || len(e.Reason) > maxReason {
			return bad("container %s: a value is out of bounds", e.ContainerID)
		}
	}
	return nil
}

// plain reports whether s is at most limit bytes of printable ASCII.
func plain(s string, limit int) bool {
	return len(s) <= limit && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// containerID reports whether s may be the ID of a container, by containerd's
// rule for identifiers, and so a name of a directory.
func containerID(s string) bool {
	return s != "" && s[0] != '.' && plain(s, 128) && !strings.ContainsAny(s, "/\\")
}

// Load reads the node manifest of the store at root. It fails with
// fs.ErrNotExist if there is none, and with [checkpoint.ErrCorrupt] if it is
// anything but what Save writes.
func Load(files fsys.FS, root string) (*Manifest, error) {
	b, err := fsys.ReadFile(files, filepath.Join(root, FileName), maxManifestBytes)
	if errors.Is(err, fsys.ErrNotRegular) || errors.Is(err, fsys.ErrTooLarge) || errors.Is(err, unix.ELOOP) {
		return nil, fmt.Errorf("node manifest: %w: %w", checkpoint.ErrCorrupt, err)
	}
	if err != nil {
		return nil, fmt.Errorf("node manifest: %w", err)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("node manifest: %w: %w", checkpoint.ErrCorrupt, err)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return &m, nil
}

// save writes the manifest durably in place of an older one. After a crash
// there is the old one, the new one, or none.
func save(files fsys.FS, root string, m *Manifest) error {
	for i := range m.Containers {
		e := &m.Containers[i]
		e.Reason = truncate(strings.ToValidUTF8(e.Reason, "?"), maxReason)
	}
	if err := m.Validate(); err != nil {
		return err
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("node manifest: %w", err)
	}
	temp := filepath.Join(root, tempName)
	if err = files.Remove(temp); err == nil || errors.Is(err, fs.ErrNotExist) {
		err = fsys.WriteFile(files, temp, append(b, '\n'))
	}
	if err == nil {
		err = remove(files, root)
	}
	if err == nil {
		err = files.Rename(temp, filepath.Join(root, FileName))
	}
	if err == nil {
		err = files.SyncDir(root)
	}
	if err != nil {
		return fmt.Errorf("node manifest: %w", err)
	}
	return nil
}

// remove removes the manifest, for good once it returns. That there is none is
// no error.
func remove(files fsys.FS, root string) error {
	err := files.Remove(filepath.Join(root, FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = files.SyncDir(root)
	}
	if err != nil {
		return fmt.Errorf("remove the node manifest: %w", err)
	}
	return nil
}

func truncate(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-3], "") + "..."
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("uname: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}
