package checkpoint

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A container that may become a template, or may begin from one, finds a random
// identifier in GenerationMount/GenerationFile, 32 hex digits and a newline. It
// is another one whenever the container goes on from a checkpoint, before any of
// its processes does, so that a clone can tell that it is one.
const (
	// GenerationMount is where the file's directory is mounted, read-only.
	GenerationMount = "/run/stasis"
	// GenerationFile is the file's name there.
	GenerationFile = "generation"
	// generationsDir holds one directory for each container, below stasis's
	// runtime directory.
	generationsDir = "generations"
)

// GenerationDir is the source of the mount of one container. The error wraps
// [ErrInvalid] if the container's ID is no file name.
func GenerationDir(runtimeDir, containerID string) (string, error) {
	if containerID == "" || len(containerID) > 255 || containerID[0] == '.' || strings.ContainsAny(containerID, "/\x00") {
		return "", fmt.Errorf("container id %.64q: %w", containerID, ErrInvalid)
	}
	return filepath.Join(runtimeDir, generationsDir, containerID), nil
}

// NewGeneration gives the container another identifier. It makes what is missing.
func NewGeneration(runtimeDir, containerID string) error {
	dir, err := GenerationDir(runtimeDir, containerID)
	if err != nil {
		return err
	}
	// Who can read it in the container may have any user ID; on the host the
	// runtime directory's mode keeps others out.
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("generation: %w", err)
		}
		if err := os.Chmod(d, 0o755); err != nil { // whatever the umask is
			return fmt.Errorf("generation: %w", err)
		}
	}
	var id [16]byte
	rand.Read(id[:]) // never fails, see crypto/rand
	name := filepath.Join(dir, GenerationFile)
	err = os.WriteFile(name+".new", append(hex.AppendEncode(nil, id[:]), '\n'), 0o644)
	if err == nil {
		err = os.Chmod(name+".new", 0o644)
	}
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		return fmt.Errorf("generation: %w", err)
	}
	return nil
}

// RemoveGeneration removes what NewGeneration made for a container.
func RemoveGeneration(runtimeDir, containerID string) error {
	dir, err := GenerationDir(runtimeDir, containerID)
	if err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("generation: %w", err)
	}
	return nil
}

// KeepGenerations removes what belongs to none of the containers.
func KeepGenerations(runtimeDir string, containerIDs []string) error {
	entries, err := os.ReadDir(filepath.Join(runtimeDir, generationsDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("generation: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !slices.Contains(containerIDs, e.Name()) {
			errs = append(errs, RemoveGeneration(runtimeDir, e.Name()))
		}
	}
	return errors.Join(errs...)
}
