package checkpoint

import (
	"encoding/json"
	"fmt"
	"io"
	"path"
	"strings"
	"time"
)

// Names within a checkpoint's directory. Where checkpointctl's lib has a name
// for the thing, that name is used.
const (
	// ManifestFile holds the [Manifest], written last.
	ManifestFile = "manifest.json"
	// ImageDir holds CRIU's images, flat as CRIU wrote them.
	ImageDir = "checkpoint"
	// MappedDir holds, in a template, the images that differ for clones whose memory is
	// mapped. They are made of those in ImageDir when the template is, and no archive has
	// them.
	MappedDir = "mapped"
	// SpecFile is the OCI runtime spec of the dumped container.
	SpecFile = "spec.dump"
	// DumpLogFile is CRIU's log of the dump.
	DumpLogFile = "dump.log"
	// RootfsDiffFile is the writable layer, in the format of package layer.
	RootfsDiffFile = "rootfs-diff.layer"
	// VolumeDir holds one layer file for each memory-backed volume.
	VolumeDir = "volumes"
)

// FormatVersion is the version of the directory's layout and of [Manifest].
// Readers refuse others.
const FormatVersion = 1

// MaxManifestBytes bounds what a reader accepts as a manifest.
const MaxManifestBytes = 4 << 20

// Manifest describes a committed checkpoint.
type Manifest struct {
	FormatVersion int       `json:"formatVersion"`
	ID            ID        `json:"id"`
	Identity      Identity  `json:"identity"`
	CreatedAt     time.Time `json:"createdAt"`
	// Template is the name under which containers of the identity's namespace
	// may begin from it; empty in a checkpoint of the identity alone. The ID is
	// then the version.
	Template string `json:"template,omitempty"`

	// The dumped container, as the runtime knew it.
	PodName     string `json:"podName"`
	PodUID      string `json:"podUID"`
	SandboxID   string `json:"sandboxID"`
	ContainerID string `json:"containerID"`
	ImageName   string `json:"imageName,omitempty"`
	ImageDigest string `json:"imageDigest"`
	Hostname    string `json:"hostname,omitempty"`

	Settings Settings `json:"settings"`
	// Fingerprint maps each compared part of the spec to a hash of its value.
	Fingerprint Fingerprint `json:"fingerprint"`

	// Generation counts the dumps of this identity since a cold start, from 1.
	Generation int `json:"generation"`
	// RestoredFrom is the checkpoint that the dumped container itself had been
	// restored from; empty after a cold start.
	RestoredFrom ID `json:"restoredFrom,omitempty"`
	// UptimeMillis is the time between the container's start and the dump.
	UptimeMillis int64 `json:"uptimeMillis"`

	Host    Host     `json:"host"`
	Volumes []Volume `json:"volumes,omitempty"`
	Sizes   Sizes    `json:"sizes"`
	Timings Timings  `json:"timings"`
	// Lost lists what was knowingly not saved: exec processes, for example.
	Lost []string `json:"lost,omitempty"`

	// Files lists every other file of the checkpoint, by slash-separated path
	// relative to its directory.
	Files []File `json:"files"`
}

// Host records what a restore must find again.
type Host struct {
	Arch          string   `json:"arch"`
	KernelRelease string   `json:"kernelRelease"`
	BootID        string   `json:"bootID"`
	CRIUVersion   string   `json:"criuVersion"`
	CPUFlags      []string `json:"cpuFlags,omitempty"`
	CgroupMode    string   `json:"cgroupMode"`
}

// Volume is a memory-backed mount whose content was saved.
type Volume struct {
	Destination string `json:"destination"` // mount point in the container
	File        string `json:"file"`        // layer file, relative to the checkpoint
}

// Sizes are in bytes.
type Sizes struct {
	MemoryBytes int64 `json:"memoryBytes"` // CRIU's image directory
	LayerBytes  int64 `json:"layerBytes"`  // writable layer
	VolumeBytes int64 `json:"volumeBytes"` // memory-backed volumes
	TotalBytes  int64 `json:"totalBytes"`
	// InUseBytes is the memory that the dumped container was charged for. It is
	// less than what CRIU wrote where processes share pages that fork copied;
	// 0 where nobody has looked.
	InUseBytes int64 `json:"inUseBytes,omitempty"`
}

// Timings are in microseconds, in the order in which the phases happen.
type Timings struct {
	FreezeMicros int64 `json:"freezeMicros"`
	CRIUMicros   int64 `json:"criuMicros"`   // the dump call as a whole
	FrozenMicros int64 `json:"frozenMicros"` // of which tasks were frozen by CRIU itself
	CopyMicros   int64 `json:"copyMicros"`   // writable layer and volumes, a template's images for mapped memory
	FsyncMicros  int64 `json:"fsyncMicros"`
	CommitMicros int64 `json:"commitMicros"` // checksums, manifest, rename, fsync of the parent
}

// File is one file of a checkpoint. CRC32C is the Castagnoli checksum of its
// content in hex: it finds damage, not malice; the store's mode 0700 keeps
// others out.
type File struct {
	Path      string `json:"path"`
	SizeBytes int64  `json:"sizeBytes"`
	CRC32C    string `json:"crc32c"`
	// Blocks are the checksums of its parts, where [BlockBytes] wants them.
	Blocks *Blocks `json:"blocks,omitempty"`
}

// OfMapped tells whether a file is needed for mapped memory alone.
func (f File) OfMapped() bool { return strings.HasPrefix(f.Path, MappedDir+"/") }

// Validate checks version, identifiers and bounds. Errors wrap [ErrCorrupt].
func (m *Manifest) Validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("manifest: "+format+": %w", append(a, ErrCorrupt)...)
	}
	if m.FormatVersion != FormatVersion {
		return bad("format version %d, this stasis reads %d", m.FormatVersion, FormatVersion)
	}
	if _, err := ParseID(string(m.ID)); err != nil {
		return bad("id: %v", err)
	}
	if err := m.Identity.Validate(); err != nil {
		return bad("%v", err)
	}
	if m.Identity.Hash() != m.ID.IdentityHash() {
		return bad("id does not belong to identity %s", m.Identity)
	}
	if m.Template != "" {
		for what, name := range map[string]string{"template": m.Template, "namespace of the template": m.Identity.Namespace} {
			if err := ValidateTemplateName(name); err != nil {
				return bad("%s: %v", what, err)
			}
		}
	}
	if m.RestoredFrom != "" {
		if _, err := ParseID(string(m.RestoredFrom)); err != nil {
			return bad("restoredFrom: %v", err)
		}
	}
	seen := make(map[string]bool, len(m.Files))
	for _, f := range m.Files {
		if !cleanRelative(f.Path) || f.Path == ManifestFile {
			return bad("file path %q", f.Path)
		}
		if seen[f.Path] {
			return bad("file %q twice", f.Path)
		}
		seen[f.Path] = true
		if f.SizeBytes < 0 {
			return bad("file %q: size %d", f.Path, f.SizeBytes)
		}
		if f.Blocks != nil {
			if err := f.Blocks.validate(f); err != nil {
				return bad("file %q: %v", f.Path, err)
			}
		}
	}
	for _, v := range m.Volumes {
		if !path.IsAbs(v.Destination) || path.Clean(v.Destination) != v.Destination {
			return bad("volume destination %q", v.Destination)
		}
		if !seen[v.File] || path.Dir(v.File) != VolumeDir {
			return bad("volume %q: file %q", v.Destination, v.File)
		}
	}
	return nil
}

// ResidentBytes is how much memory the dumped processes occupied that a restore
// must fill again: the pages that CRIU wrote. What they mapped of files
// unchanged, and memory-backed volumes, do not count.
func (m *Manifest) ResidentBytes() (n int64) {
	for _, f := range m.Files {
		if isPages(f.Path) {
			n += f.SizeBytes
		}
	}
	return n
}

// isPages tells whether a file of a checkpoint holds memory.
func isPages(name string) bool {
	ok, _ := path.Match(ImageDir+"/pages-*.img", name) // the pattern is valid
	return ok
}

// Blocks are the files with checksums of their blocks, by their names in the
// image directory.
func (m *Manifest) Blocks() map[string]File {
	files := map[string]File{}
	for _, f := range m.Files {
		if f.Blocks != nil {
			files[path.Base(f.Path)] = f
		}
	}
	return files
}

func cleanRelative(p string) bool {
	return p != "" && p != "." && !path.IsAbs(p) && path.Clean(p) == p && p != ".." && !strings.HasPrefix(p, "../")
}

// ReadManifest decodes and validates a manifest, reading at most
// [MaxManifestBytes]. Errors wrap [ErrCorrupt].
func ReadManifest(r io.Reader) (*Manifest, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxManifestBytes+1))
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if len(data) > MaxManifestBytes {
		return nil, fmt.Errorf("manifest: more than %d bytes: %w", MaxManifestBytes, ErrCorrupt)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("manifest: %w: %w", ErrCorrupt, err)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return &m, nil
}

// Encode is the manifest's form on disk.
func (m *Manifest) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return append(b, '\n'), nil
}
