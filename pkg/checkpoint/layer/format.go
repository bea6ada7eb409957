package layer

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

const formatVersion = "1"

// PAX records, see the package's documentation.
const (
	recordVersion = "STASIS.layer"
	recordEnd     = "STASIS.end"
	recordSparse  = "STASIS.sparse"
	recordXattr   = "SCHILY.xattr."
	recordXattrEq = "STASIS.xattr."
)

// Bounds. Together they keep an entry's PAX header below the 1 MiB that Go's
// archive/tar reads.
const (
	maxPath       = 4095      // bytes, PATH_MAX without its NUL
	maxSegments   = 8192      // data segments of a sparse file
	maxXattrName  = 255       // bytes, XATTR_NAME_MAX
	maxXattrValue = 64 << 10  // bytes, XATTR_SIZE_MAX
	maxXattrBytes = 512 << 10 // names and values of one entry
)

// Most layers are small, and memory that is touched for the first time is dear:
// only who copies the contents of large files has a large buffer.
const (
	bufferSize = 1 << 20  // at most, for file contents
	streamSize = 64 << 10 // for the stream
)

// grown is a buffer of n bytes, buf where that has room for them.
func grown(buf []byte, n int64) []byte { return slices.Grow(buf[:0], int(n))[:n] }

const (
	xattrACLAccess  = "system.posix_acl_access"
	xattrACLDefault = "system.posix_acl_default"
	xattrOverlay    = "trusted.overlay."
)

// segment is a run of data in a file, in bytes.
type segment struct{ off, len int64 }

type xattr struct {
	name  string
	value string
}

// entry is one checked member of a layer.
type entry struct {
	*tar.Header
	name   string // clean and relative; "." is the root
	target string // of a hard link: clean and relative
	xattrs []xattr
	size   int64     // of a regular file, holes included
	data   []segment // of a regular file, in order; lengths add up to Header.Size
}

func (e *entry) whiteout() bool {
	return e.Typeflag == tar.TypeChar && e.Devmajor == 0 && e.Devminor == 0
}

func (e *entry) xattr(name string) (string, bool) {
	for _, x := range e.xattrs {
		if x.name == name {
			return x.value, true
		}
	}
	return "", false
}

func corrupt(format string, a ...any) error {
	return fmt.Errorf("layer: "+format+": %w", append(a, checkpoint.ErrCorrupt)...)
}

// overlayBookkeeping reports whether the overlay itself made the attribute and
// it means nothing in a copy of the tree. In the kernel's
// Documentation/filesystems/overlayfs.rst and fs/overlayfs: "origin" is the
// file handle of the lower inode and "uuid" the overlay's identity, both bound
// to one file system, and a root whose "origin" does not fit fails the mount
// with ESTALE where the index is on; "impure" says that a directory holds files
// with an origin; "nlink" is relative to the index in the work directory, and
// "upper" belongs to entries of that index. Without them the overlay falls back
// to what it does for files that never were on a lower layer: other inode
// numbers, same tree.
func overlayBookkeeping(name string) bool {
	suffix, ok := strings.CutPrefix(name, xattrOverlay)
	return ok && slices.Contains([]string{"origin", "uuid", "impure", "nlink", "upper"}, suffix)
}

// xattrAllowed reports whether an extended attribute belongs in a layer.
func xattrAllowed(name, value string) bool {
	if len(name) > maxXattrName || len(value) > maxXattrValue || strings.ContainsRune(name, 0) {
		return false
	}
	if suffix, ok := strings.CutPrefix(name, xattrOverlay); ok {
		switch suffix {
		case "opaque": // "x": the directory may hold whiteouts that are regular files
			return value == "y" || value == "x"
		case "redirect":
			return redirectAllowed(value)
		case "metacopy": // empty, or struct ovl_metacopy with a digest of at most 64 bytes
			return len(value) <= 4+64
		case "whiteout":
			return len(value) <= 1
		case "protattr": // inode flags of the lower file: append-only, immutable
			return value != "" && len(value) <= 2 && strings.Trim(value, "ai") == ""
		}
		// Escaped: attributes of an overlay within the container, plain data to
		// the outer one.
		return len(suffix) > len("overlay.") && strings.HasPrefix(suffix, "overlay.")
	}
	return name == "security.capability" || name == xattrACLAccess || name == xattrACLDefault ||
		strings.HasPrefix(name, "user.") && len(name) > len("user.")
}

// redirectAllowed checks the place that a renamed directory or a file without
// data has on the lower layers: an absolute path, or a name in the same
// directory.
func redirectAllowed(v string) bool {
	if strings.ContainsRune(v, 0) || len(v) > maxPath {
		return false
	}
	if strings.HasPrefix(v, "/") {
		return v != "/" && path.Clean(v) == v
	}
	return v != "" && v != "." && v != ".." && !strings.Contains(v, "/")
}

// nameAllowed accepts a clean relative path that does not leave the tree.
func nameAllowed(p string) bool {
	return p != "" && p != ".." && len(p) <= maxPath && !strings.HasPrefix(p, "/") && !strings.HasPrefix(p, "../") &&
		path.Clean(p) == p && !strings.ContainsRune(p, 0)
}

// paxXattrs adds attributes to the PAX records.
func paxXattrs(records map[string]string, xattrs []xattr) {
	for _, x := range xattrs {
		if strings.Contains(x.name, "=") {
			records[recordXattrEq+url.QueryEscape(x.name)] = x.value
		} else {
			records[recordXattr+x.name] = x.value
		}
	}
}

func formatSparse(size int64, segs []segment) string {
	b := strconv.AppendInt(nil, size, 10)
	for _, s := range segs {
		b = append(b, ';')
		b = strconv.AppendInt(b, s.off, 10)
		b = append(b, ',')
		b = strconv.AppendInt(b, s.len, 10)
	}
	return string(b)
}

// parseSparse checks that the segments are in order, do not overlap, lie within
// the file and make up a body of that many bytes.
func parseSparse(v string, body int64) (size int64, segs []segment, err error) {
	fields := strings.Split(v, ";")
	if len(fields) > maxSegments+1 {
		return 0, nil, fmt.Errorf("%d segments, at most %d are allowed", len(fields)-1, maxSegments)
	}
	if size, err = parseSize(fields[0]); err != nil {
		return 0, nil, err
	}
	var end, sum int64
	for _, f := range fields[1:] {
		off, length, ok := strings.Cut(f, ",")
		if !ok {
			return 0, nil, fmt.Errorf("segment %q", f)
		}
		var s segment
		if s.off, err = parseSize(off); err != nil {
			return 0, nil, err
		}
		if s.len, err = parseSize(length); err != nil {
			return 0, nil, err
		}
		if s.off < end || s.len == 0 || s.off > size || s.len > size-s.off {
			return 0, nil, fmt.Errorf("segment of %d bytes at %d, after %d in a file of %d", s.len, s.off, end, size)
		}
		end = s.off + s.len
		sum += s.len
		segs = append(segs, s)
	}
	if sum != body {
		return 0, nil, fmt.Errorf("segments of %d bytes, body of %d", sum, body)
	}
	return size, segs, nil
}

func parseSize(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 63)
	return int64(n), err
}

// decoder reads checked entries. Errors wrap [checkpoint.ErrCorrupt] unless
// reading itself failed.
type decoder struct {
	tr      *tar.Reader
	entries int64
	path    []string // the directories that the current entry lies in, from "."
}

func newDecoder(r io.Reader) (*decoder, error) {
	d := &decoder{tr: tar.NewReader(r)}
	h, err := d.header()
	if err != nil {
		return nil, err
	}
	if v, ok := h.PAXRecords[recordVersion]; h.Typeflag != tar.TypeXGlobalHeader || !ok {
		return nil, corrupt("not a layer")
	} else if v != formatVersion {
		return nil, corrupt("format version %.20q, this stasis reads %s", v, formatVersion)
	}
	return d, nil
}

// header reads the next header; a missing end is an error.
func (d *decoder) header() (*tar.Header, error) {
	h, err := d.tr.Next()
	switch {
	case err == nil:
		return h, nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, corrupt("cut short after %d entries", d.entries)
	case errors.Is(err, tar.ErrHeader), errors.Is(err, tar.ErrFieldTooLong), errors.Is(err, tar.ErrInsecurePath):
		return nil, corrupt("after %d entries: %v", d.entries, err)
	default:
		return nil, fmt.Errorf("layer: read: %w", err)
	}
}

// next returns io.EOF after the last entry.
func (d *decoder) next() (*entry, error) {
	h, err := d.header()
	if err != nil {
		return nil, err
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		if h.PAXRecords[recordEnd] != strconv.FormatInt(d.entries, 10) {
			return nil, corrupt("%d entries, but the end says %.20q", d.entries, h.PAXRecords[recordEnd])
		}
		return nil, io.EOF
	}
	e := &entry{Header: h, name: h.Name}
	if h.Typeflag == tar.TypeDir {
		e.name = strings.TrimSuffix(h.Name, "/")
	}
	bad := func(format string, a ...any) error {
		return corrupt("entry %.200q: "+format, append([]any{h.Name}, a...)...)
	}
	if !nameAllowed(e.name) {
		return nil, bad("name")
	}
	if (e.name == ".") != (d.entries == 0) {
		return nil, bad("the root comes first and only once")
	}
	if e.name != "." {
		parent := path.Dir(e.name)
		for len(d.path) > 0 && d.path[len(d.path)-1] != parent {
			d.path = d.path[:len(d.path)-1]
		}
		if len(d.path) == 0 {
			return nil, bad("its directory did not come before, or was left")
		}
	}
	if h.Typeflag == tar.TypeDir {
		d.path = append(d.path, e.name)
	}
	if h.Mode&^0o7777 != 0 {
		return nil, bad("mode %#o", h.Mode)
	}
	// 2^32-1 means "leave as it is" to chown(2).
	if int64(h.Uid) < 0 || int64(h.Uid) >= math.MaxUint32 || int64(h.Gid) < 0 || int64(h.Gid) >= math.MaxUint32 {
		return nil, bad("owner %d:%d", h.Uid, h.Gid)
	}
	switch h.Typeflag {
	case tar.TypeDir, tar.TypeFifo:
	case tar.TypeReg:
		if err := e.sparse(); err != nil {
			return nil, bad("sparse map: %v", err)
		}
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) > maxPath || strings.ContainsRune(h.Linkname, 0) {
			return nil, bad("link target of %d bytes", len(h.Linkname))
		}
	case tar.TypeLink:
		if e.target = h.Linkname; !nameAllowed(e.target) || e.target == "." {
			return nil, bad("hard link to %.200q", h.Linkname)
		}
	case tar.TypeChar, tar.TypeBlock:
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, bad("device %d:%d", h.Devmajor, h.Devminor)
		}
	default:
		return nil, bad("type %q", h.Typeflag)
	}
	if e.name == "." && h.Typeflag != tar.TypeDir {
		return nil, bad("the root is no directory")
	}
	if err := e.decodeXattrs(); err != nil {
		return nil, bad("%v", err)
	}
	d.entries++
	return e, nil
}

// sparse fills size and data.
func (e *entry) sparse() (err error) {
	for k := range e.PAXRecords {
		// archive/tar would expand these by itself, and out of all proportion.
		if strings.HasPrefix(k, "GNU.sparse.") {
			return fmt.Errorf("record %.40q", k)
		}
	}
	if v, ok := e.PAXRecords[recordSparse]; ok {
		e.size, e.data, err = parseSparse(v, e.Size)
		return err
	}
	if e.size = e.Size; e.size > 0 {
		e.data = []segment{{0, e.size}}
	}
	return nil
}

func (e *entry) decodeXattrs() error {
	total := 0
	for k, v := range e.PAXRecords {
		name, ok := strings.CutPrefix(k, recordXattr)
		if !ok {
			if name, ok = strings.CutPrefix(k, recordXattrEq); !ok {
				continue
			}
			var err error
			if name, err = url.QueryUnescape(name); err != nil {
				return err
			}
		}
		if !xattrAllowed(name, v) {
			return fmt.Errorf("extended attribute %.255q of %d bytes", name, len(v))
		}
		if total += len(name) + len(v); total > maxXattrBytes {
			return fmt.Errorf("extended attributes of more than %d bytes", maxXattrBytes)
		}
		e.xattrs = append(e.xattrs, xattr{name, v})
	}
	slices.SortFunc(e.xattrs, func(a, b xattr) int { return cmp.Compare(a.name, b.name) })
	return nil
}

// body reads the data of the current entry. Errors wrap [checkpoint.ErrCorrupt]
// where the stream ended early.
func (d *decoder) body(buf []byte) error {
	_, err := io.ReadFull(d.tr, buf)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return corrupt("cut short within entry %d", d.entries)
	}
	return err
}

// encoder writes entries between the two global headers.
type encoder struct {
	tw      *tar.Writer
	entries int64
}

func newEncoder(w io.Writer) (*encoder, error) {
	e := &encoder{tw: tar.NewWriter(w)}
	return e, e.global(recordVersion, formatVersion)
}

func (e *encoder) global(key, value string) error {
	return e.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{key: value}, Format: tar.FormatPAX})
}

func (e *encoder) header(h *tar.Header) error {
	e.entries++
	return e.tw.WriteHeader(h)
}

func (e *encoder) close() error {
	if err := e.global(recordEnd, strconv.FormatInt(e.entries, 10)); err != nil {
		return err
	}
	return e.tw.Close()
}
