// Package layer saves a directory tree in one stream and makes it again: the
// upper directory of a container's overlay, /dev/shm, a memory-backed volume.
//
// Invariants:
//
//   - Neither [Capture] nor [Apply] ever reaches a file outside the directory it
//     was given: every path is resolved by openat2(2) beneath that directory,
//     through no symbolic link and into no other mount.
//   - What [Apply] reads is untrusted until checked: names, link targets, sparse
//     maps, attributes and sizes that a tree could not have are [checkpoint.ErrCorrupt].
//   - What [Apply] made can be taken back by [Applied.Undo], also after an error.
//   - A layer that was cut short is never taken for a whole one.
//
// A layer is a PAX archive (POSIX.1-2001) that ordinary tar programs can list.
// Beyond the standard it has:
//
//   - global headers first and last: the records STASIS.layer (format version)
//     and STASIS.end (number of entries between them);
//   - the tree's own root as first entry, "./", and each directory right before
//     what it holds, in the order of names;
//   - extended attributes as SCHILY.xattr.NAME, as GNU tar and libarchive have
//     them; names with "=", which a PAX key cannot hold, as STASIS.xattr.NAME
//     with NAME in URL encoding;
//   - STASIS.sparse = "SIZE;OFFSET,LENGTH;..." for a file with holes, in decimal
//     bytes: the body holds only the listed segments, one after the other. Go's
//     archive/tar does not write GNU's sparse formats;
//   - overlay whiteouts as they lie on disk: character devices 0:0.
//
// Not saved: sockets (whoever restores the process binds them anew), what is
// mounted below the directory, inode flags (chattr), inode numbers, ctime, and
// the extended attributes that [Capture] lists.
package layer
